"""The ledger: calls to the database functions through Supabase, and their outcomes."""
