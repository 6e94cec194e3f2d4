"""The ledger: calls of the database functions through Supabase, and what their results mean."""
