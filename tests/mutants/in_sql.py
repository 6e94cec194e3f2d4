"""Mutants of the database's functions: each rule left out, compared the wrong way, told wrongly."""

from mutants.mutant import DEBIT_SQL, Mutant

FIND = "  earlier := ledger.find_outcome(user_id_input, idempotency_key_input);\n"
SAME_REQUEST = """  if earlier -> 'item_id' = answer -> 'item_id'
    and earlier -> 'expected_price' = answer -> 'expected_price' then
"""
USER_INACTIVE = "    when not buyer.active then 'user_inactive'\n"
ITEM_UNKNOWN = "    when wanted.id is null then 'item_not_found'\n"
ITEM_INACTIVE = "    when not wanted.active then 'item_inactive'\n"
PRICE = "    when wanted.price <> expected_price_input then 'price_changed'\n"
FUNDS = "    when wanted.price > buyer.balance then 'insufficient_funds'\n"
STORED = "    if idempotency_key_input is not null then\n"
BATCH_CALL = (
    "        debit.user_id, debit.item_id, debit.idempotency_key, debit.expected_price, "
    "debit.attempt\n"
)

OF_RULES = (
    ("no key is looked up", FIND, "  earlier := null;\n"),
    ("a reused key is told as a replay", SAME_REQUEST, "  if earlier is not null then\n"),
    (
        "another item under the key is a replay",
        SAME_REQUEST,
        "  if earlier -> 'expected_price' = answer -> 'expected_price' then\n",
    ),
    (
        "another expected price under the key is a replay",
        SAME_REQUEST,
        "  if earlier -> 'item_id' = answer -> 'item_id' then\n",
    ),
    (
        "an unknown user is told as inactive",
        "'outcome', 'user_not_found'",
        "'outcome', 'user_inactive'",
    ),
    ("an inactive user is sold to", USER_INACTIVE, ""),
    ("only inactive users are sold to", USER_INACTIVE, USER_INACTIVE.replace("not ", "")),
    (
        "an unknown item is told as inactive",
        ITEM_UNKNOWN,
        ITEM_UNKNOWN.replace("not_found", "inactive"),
    ),
    ("an inactive item is sold", ITEM_INACTIVE, ""),
    (
        "the item is checked before the user",
        USER_INACTIVE + ITEM_UNKNOWN,
        ITEM_UNKNOWN + USER_INACTIVE,
    ),
    ("the expected price is ignored", PRICE, ""),
    ("only a higher price has changed", PRICE, PRICE.replace("<>", ">")),
    ("only a lower price has changed", PRICE, PRICE.replace("<>", "<")),
    ("the expected price must not be the price", PRICE, PRICE.replace("<>", "=")),
    ("the balance is checked before the price", PRICE + FUNDS, FUNDS + PRICE),
    ("the balance is not checked", FUNDS, ""),
    ("the last coin cannot be spent", FUNDS, FUNDS.replace(" > ", " >= ")),
    ("a debt of one is allowed", FUNDS, FUNDS.replace("buyer.balance", "buyer.balance + 1")),
    ("declines are not stored", STORED, "    if false then\n"),
    (
        "a decline's price is not stored",
        "        (answer ->> 'price')::bigint, attempt_input\n",
        "        null, attempt_input\n",
    ),
    ("the new price is not told", "    if refusal = 'price_changed' then\n", "    if false then\n"),
    (
        "a decline's expected price is not stored",
        "refusal, item_input, expected_price_input,\n",
        "refusal, item_input, null,\n",
    ),
    ("a free item costs one", "'debit', -wanted.price,", "'debit', -greatest(wanted.price, 1),"),
    (
        "the balance is not updated",
        '  update public."Users" set balance = entry.balance_after where',
        '  update public."Users" set balance = entry.balance_after where false and',
    ),
    (
        "the amount has the sign of the entry",
        "    'amount', -entry.amount_delta,\n    'new_balance', entry.balance_after,\n"
        "    'created_at', entry.created_at\n  );",
        "    'amount', entry.amount_delta,\n    'new_balance', entry.balance_after,\n"
        "    'created_at', entry.created_at\n  );",
    ),
    (
        "the balance before the debit is told",
        "    'new_balance', entry.balance_after,\n    'created_at', entry.created_at\n  );",
        "    'new_balance', balance_before,\n    'created_at', entry.created_at\n  );",
    ),
    (
        "the attempt is not the entry's id",
        "coalesce(id_input, gen_random_uuid())",
        "gen_random_uuid()",
    ),
)

OF_LOOKUPS = (
    (
        "a payment under another user's key is found",
        "  where entry.user_id = user_id_input and entry.idempotency_key = idempotency_key_input\n",
        "  where entry.idempotency_key = idempotency_key_input\n",
    ),
    (
        "a decline under another user's key is found",
        "  where decline.user_id = user_id_input and decline.idempotency_key = "
        "idempotency_key_input\n",
        "  where decline.idempotency_key = idempotency_key_input limit 1\n",
    ),
    (
        "declines are not found",
        "  from ledger.declines as decline\n",
        "  from (select * from ledger.declines where false) as decline\n",
    ),
    (
        "a repeated payment is told as the first",
        "    'replayed', true\n  )\n  from public",
        "    'replayed', false\n  )\n  from public",
    ),
    (
        "a repeated decline is told as the first",
        "    'replayed', true\n  )\n  from ledger",
        "    'replayed', false\n  )\n  from ledger",
    ),
    (
        "a look-up has no members that are null",
        "  select ledger.find_outcome(user_id_input, idempotency_key_input)\n",
        "  select jsonb_strip_nulls(ledger.find_outcome(user_id_input, idempotency_key_input))\n",
    ),
)

OF_BATCHES = (
    (
        "outcomes are in the opposite order",
        "order by request.place\n",
        "order by request.place desc\n",
    ),
    ("a busy debit is told as declined", "'outcome', 'busy'", "'outcome', 'user_inactive'"),
    ("a batch waits for users", "for no key update skip locked", "for no key update"),
    ("a batch waits for items", "for key share skip locked", "for key share"),
    ("a batch locks users too strongly", "for no key update skip locked", "for update skip locked"),
    (
        "a batch locks items too strongly",
        "for key share skip locked",
        "for no key update skip locked",
    ),
    (
        "an unknown user is told as busy",
        "      debit.user_id = any(locked)\n      or not exists",
        "      debit.user_id = any(locked)\n      and exists",
    ),
    (
        "an unknown item is told as busy",
        "      debit.item_id = any(locked_items)\n      or not exists",
        "      debit.item_id = any(locked_items)\n      and exists",
    ),
    ("a batch ignores keys", BATCH_CALL, BATCH_CALL.replace("debit.idempotency_key", "null")),
    (
        "a batch ignores expected prices",
        BATCH_CALL,
        BATCH_CALL.replace("debit.expected_price", "null"),
    ),
)

MUTANTS = [
    Mutant(f"{where}: {name}", DEBIT_SQL, old, new, "test_batches.py")
    for where, mutants in (("rules", OF_RULES), ("look-up", OF_LOOKUPS), ("batch", OF_BATCHES))
    for name, old, new in mutants
]
