"""Mutants of the database functions: rules that are left out, inverted or misreported."""

from mutants.mutant import DEBIT_SQL, Mutant

SAME_ITEM = "(stored ->> 'item_id')::uuid is not distinct from debit.item_id"
SAME_PRICE = "(stored ->> 'expected_price')::bigint is not distinct from debit.expected_price"
SAME_ACTOR = "coalesce(stored ->> 'actor' = debit.actor, true)"
USER_INACTIVE = "        when not debit.user_is_active then 'user_inactive'\n"
ITEM_UNKNOWN = "        when item_place is null then 'item_not_found'\n"
ITEM_INACTIVE = "        when not items_are_active[item_place] then 'item_inactive'\n"
PRICE = "        when price <> debit.expected_price then 'price_changed'\n"
FUNDS = "        when price > new_balance then 'insufficient_funds'\n"
BUSY_USER = "where card_id = debit.user_id and not debit.user_is_locked"
BUSY_ITEM = "where id = debit.item_id and item_place is null"
WRITE = "    select * from unnest(entries);\n"

OF_RULES = (
    (
        "no key is looked up",
        "    if key_is_known then\n",
        "    if false then\n",
    ),
    ("a reused key is returned as a replay", "else 'idempotency_key_reused'", "else 'replayed'"),
    ("another item under the key is a replay", SAME_ITEM, "true"),
    ("another expected price under the key is a replay", SAME_PRICE, "true"),
    ("another actor's key is a replay", SAME_ACTOR, "true"),
    ("a missing actor is another actor", SAME_ACTOR, SAME_ACTOR.replace(", true", ", false")),
    (
        "an unknown user is returned as inactive",
        "then 'user_not_found'",
        "then 'user_inactive'",
    ),
    ("an inactive user is charged", USER_INACTIVE, ""),
    ("only inactive users are charged", USER_INACTIVE, USER_INACTIVE.replace("not ", "")),
    (
        "an unknown item is returned as inactive",
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
    ("only a higher price is reported as changed", PRICE, PRICE.replace("<>", ">")),
    ("only a lower price is reported as changed", PRICE, PRICE.replace("<>", "<")),
    ("an expected price that equals the price is declined", PRICE, PRICE.replace("<>", "=")),
    ("the balance is checked before the price", PRICE + FUNDS, FUNDS + PRICE),
    ("the balance is not checked", FUNDS, ""),
    ("a balance that equals the price is declined", FUNDS, FUNDS.replace(" > ", " >= ")),
    (
        "a new balance of -1 is allowed",
        FUNDS,
        FUNDS.replace("new_balance", "new_balance + 1"),
    ),
    (
        "each debit of a call may spend the balance before the call",
        FUNDS,
        FUNDS.replace("new_balance", "debit.balance"),
    ),
    (
        "declines are not stored",
        "      declined := declined || debit;\n",
        "",
    ),
    (
        "a decline's price is not stored",
        "      (outcomes[request.place] ->> 'price')::bigint,\n",
        "      null,\n",
    ),
    (
        "the new price is not returned",
        "jsonb_build_object('price', price)",
        "'{}'",
    ),
    (
        "a decline's expected price is not stored",
        "      request.expected_price,\n      (outcomes",
        "      null,\n      (outcomes",
    ),
    ("a decline's actor is not stored", "      request.actor\n    from", "      null\n    from"),
    (
        "an entry's actor is not stored",
        "debit.expected_price, debit.actor\n      )::",
        "debit.expected_price, null\n      )::",
    ),
    (
        "a free item costs 1",
        "      new_balance := new_balance - price;\n",
        "      price := greatest(price, 1);\n      new_balance := new_balance - price;\n",
    ),
    ("the entry is not written", WRITE, WRITE.replace(";", " where false;")),
    (
        "the balance is not updated",
        '      update public."Users" set balance = entry.balance_after where',
        '      update public."Users" set balance = entry.balance_after where false and',
    ),
    (
        "the amount has the sign of the entry",
        "        'amount', price,\n",
        "        'amount', -price,\n",
    ),
    (
        "the balance before the call is returned",
        "        'new_balance', new_balance,\n        'created_at', entry_at",
        "        'new_balance', debit.balance,\n        'created_at', entry_at",
    ),
    (
        "the attempt is not the entry's id",
        "coalesce(debit.attempt, gen_random_uuid())",
        "gen_random_uuid()",
    ),
)

OF_LOOKUPS = (
    (
        "a payment under another user's key is found",
        "  where entry.user_id = user_id_input and entry",
        "  where entry",
    ),
    (
        "a decline under another user's key is found",
        "  where decline.user_id = user_id_input and decline",
        "  where decline",
    ),
    (
        "payments are not found",
        "and entry.idempotency_key = idempotency_key_input\n",
        "and false\n",
    ),
    (
        "declines are not found",
        "and decline.idempotency_key = idempotency_key_input\n",
        "and false\n",
    ),
    (
        "a repeated payment is returned as the first",
        "    'replayed', true\n  )\n  from public",
        "    'replayed', false\n  )\n  from public",
    ),
    (
        "a repeated decline is returned as the first",
        "    'replayed', true\n  )\n  from ledger",
        "    'replayed', false\n  )\n  from ledger",
    ),
    (
        "a lookup omits members that are null",
        "  select ledger.find_outcome(user_id_input, idempotency_key_input)\n",
        "  select jsonb_strip_nulls(ledger.find_outcome(user_id_input, idempotency_key_input))\n",
    ),
)

OF_BATCHES = (
    (
        "outcomes are in the order of processing",
        "outcomes[debit.place] := jsonb_build_object(\n        'outcome', result",
        "outcomes[cardinality(entries)] := jsonb_build_object(\n        'outcome', result",
    ),
    (
        "debits of a user are processed in the opposite order",
        "order by user_id, place\n",
        "order by user_id, place desc\n",
    ),
    ("a busy debit is returned as declined", "result := 'busy';", "result := 'user_inactive';"),
    ("a batch waits for users", "for no key update skip locked", "for no key update"),
    ("a batch waits for items", "for key share skip locked", "for key share"),
    ("a batch locks users too strongly", "for no key update skip locked", "for update skip locked"),
    (
        "a batch locks items too strongly",
        "for key share skip locked",
        "for no key update skip locked",
    ),
    ("a busy user is returned as unknown", BUSY_USER, "where false"),
    ("a busy item is returned as unknown", BUSY_ITEM, "where false"),
    (
        "a key that occurs twice in a batch is charged twice",
        "    elsif debit.idempotency_key = any(stored_keys) then\n",
        "    elsif false then\n",
    ),
    (
        "a repeat gets the outcome of the next repeat",
        "outcomes[debit.place] := repeated_outcomes[debit.place];",
        "outcomes[debit.place] := repeated_outcomes[repeated[1].place];",
    ),
    (
        "a user's entries continue those of the previous user",
        "    if debit.user_id is distinct from charged_user then\n",
        "    if charged_user is null then\n",
    ),
    (
        "only the first entry of a user changes the balance",
        "if entry.user_id is distinct from entries[number + 1].user_id then",
        "if entry.user_id is distinct from entries[number - 1].user_id then",
    ),
)

MUTANTS = [
    Mutant(f"{where}: {name}", DEBIT_SQL, old, new, "test_batches.py")
    for where, mutants in (("rules", OF_RULES), ("lookup", OF_LOOKUPS), ("batch", OF_BATCHES))
    for name, old, new in mutants
]
