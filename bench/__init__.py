"""Load profiles and peers: how fast the service is, beside what it is compared with."""
