"""A plain implementation of the service, for comparison.

It calls `debit_use` with a generated key through a synchronous Supabase client in an async route,
and calls the products service with a client that it creates for each request.
"""

import os
from typing import Any
from uuid import uuid4

import httpx
from fastapi import FastAPI, HTTPException
from supabase import create_client

from bench.models import DebitRequest

app = FastAPI()

supabase = create_client(os.environ["SUPABASE_URL"], os.environ["SUPABASE_KEY"])
products_url = os.environ["PRODUCTS_SERVICE_URL"]


@app.post("/payments/debit")
async def post_debit(debit: DebitRequest) -> dict[str, Any]:
    """Charge the user for the item."""
    async with httpx.AsyncClient() as client:
        response = await client.get(f"{products_url}/items/{debit.item_id}")
    if response.status_code != 200 or not response.json()["active"]:
        raise HTTPException(404, "Item not found")
    arguments = {
        "user_id_input": debit.user_id,
        "item_input": str(debit.item_id),
        "idempotency_key_input": str(uuid4()),
        "expected_price_input": debit.expected_price,
    }
    outcome: Any = supabase.rpc("debit_use", arguments).execute().data
    if outcome["outcome"] != "debited":
        raise HTTPException(402, outcome["outcome"])
    return {
        name: outcome[name]
        for name in ("user_id", "new_balance", "transaction_id", "item_id", "amount", "created_at")
    }
