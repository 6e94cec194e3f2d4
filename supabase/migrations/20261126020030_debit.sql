-- Charging a user for an item: debit_use for one debit, debit_use_batch for several, find_payment
-- to look up an outcome. All rules are in ledger.charge.
--
-- Outcomes, in the order of the checks:
--   user_not_found          the user does not exist; not stored
--   (the stored outcome)    the key was used before for the same item and expected price
--   idempotency_key_reused  the key was used before for another request; not stored
--   user_inactive           the user is deactivated
--   item_not_found          the item does not exist
--   item_inactive           the item is not for sale
--   price_changed           the price differs from the expected price; has the member "price"
--   insufficient_funds      the balance is lower than the price
--   debited                 the entry and the new balance are written
-- and of debit_use_batch only:
--   busy                    another transaction has locked the user or the item; nothing is done
--
-- Declines are returned, not raised: an exception would roll back the stored decline. Exceptions
-- are for failures. If a balance differs from the user's last entry (after a restore, or a write
-- past the triggers), a debit raises check_violation and overwrites nothing.
--
-- attempt is an id that the service generates for each request. It becomes the id of the entry, so
-- that the service can distinguish a replay of its own lost response from a replay of an earlier
-- request. It is also the key of a debit without a key.
-- actor names the caller, if the service knows it. Keys of two callers can collide. A key that
-- another actor used is therefore reused, not replayed.

begin;

-- The check: the file before was applied. Older functions of these names are dropped: an overload
-- makes the call ambiguous to PostgREST.
do $$
declare
  older record;
begin
  if obj_description(to_regnamespace('ledger'), 'pg_namespace') is null
    or to_regprocedure('ledger.verify_entry()') is null then
    raise exception using
      errcode = 'object_not_in_prerequisite_state',
      message = 'The migration before this one was not applied; apply the files in order, and read '
      'the message of the first that fails.';
  end if;

  for older in
    select oid::regprocedure as name, prokind from pg_proc
    where pronamespace = 'public'::regnamespace
      and proname in ('debit_use', 'debit_use_batch', 'find_payment')
      and (
        prorettype <> 'jsonb'::regtype or proretset
        or pg_get_function_identity_arguments(oid) not in (
          'user_id_input bigint, item_input uuid, idempotency_key_input text, '
          'expected_price_input bigint, attempt_input uuid, actor_input text',
          'debits jsonb',
          'user_id_input bigint, idempotency_key_input text'
        )
      )
  loop
    execute format('drop routine %s', older.name);
  end loop;
  drop function if exists ledger.debit(bigint, uuid, text, bigint);
  if to_regtype('ledger.debit_request') is not null then
    drop function if exists ledger.charge(ledger.debit_request[], bigint[], uuid[]);
    drop function if exists ledger.write_entries(ledger.entry[]);
    drop type ledger.debit_request;
  end if;

  -- A debit, its place in the call, and the row of its user as it was locked.
  if to_regtype('ledger.debit') is null then
    create type ledger.debit as (
      place integer,
      user_id bigint,
      item_id uuid,
      idempotency_key text,
      expected_price bigint,
      attempt uuid,
      actor text,
      user_is_locked boolean,
      user_is_active boolean,
      balance bigint
    );
  end if;
  -- The columns that a debit writes. The table may have more columns.
  if to_regtype('ledger.entry') is null then
    create type ledger.entry as (
      id uuid,
      user_id bigint,
      seq bigint,
      kind text,
      item uuid,
      amount_delta bigint,
      balance_after bigint,
      created_at timestamptz,
      idempotency_key text,
      expected_price bigint,
      actor text
    );
  end if;
end
$$;

-- Return the outcome stored for a key of a user as a replay, or null.
create or replace function ledger.find_outcome(
  user_id_input bigint, idempotency_key_input text
) returns jsonb
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
  select jsonb_strip_nulls(jsonb_build_object('actor', entry.actor)) || jsonb_build_object(
    'outcome', 'debited',
    'transaction_id', entry.id,
    'user_id', entry.user_id,
    'item_id', entry.item,
    'expected_price', entry.expected_price,
    'amount', -entry.amount_delta,
    'new_balance', entry.balance_after,
    'created_at', entry.created_at,
    'replayed', true
  )
  from public."Transaction_History" as entry
  where entry.user_id = user_id_input and entry.idempotency_key = idempotency_key_input
  union all
  select jsonb_strip_nulls(
    jsonb_build_object(
      'price', decline.price, 'attempt', decline.attempt, 'actor', decline.actor
    )
  ) || jsonb_build_object(
    'outcome', decline.outcome,
    'item_id', decline.item_id,
    'expected_price', decline.expected_price,
    'replayed', true
  )
  from ledger.declines as decline
  where decline.user_id = user_id_input and decline.idempotency_key = idempotency_key_input
$$;

-- Decide all debits of a call by the rules, in the order given, and write the results. Items are
-- read by one query. Entries and declines are written by one statement each. The history is read by
-- user, because Citus sends a statement to the node of the user only if it names one user.
--
-- The debits of a user follow each other, in the order of their places. The caller has locked the
-- users of debits with user_is_locked, and nobody can remove the items in locked_items. A debit
-- whose user or item exists but is not locked is busy. The result has each outcome at the place of
-- its debit.
--
-- PostgreSQL initialises each expression once per transaction. With many more expressions here or
-- in the triggers, the memory of a single debit passes 128 KiB, the allocator of glibc returns it
-- to the system after each call, and the call costs 10 % more (measured: page faults).
create or replace function ledger.charge(
  debits ledger.debit[], locked_items uuid[]
) returns jsonb[]
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan -- planning takes longer than running
as $$
declare
  decided_at timestamptz := clock_timestamp();
  debit ledger.debit;
  stored jsonb;
  result text;
  -- The items of the call; an item has the same place in all three:
  item_ids uuid[];
  prices bigint[];
  items_are_active boolean[];
  item_place integer;
  price bigint;
  -- What this call has read and decided so far for the user of the debit:
  charged_user bigint;
  last_balance bigint;
  new_balance bigint;
  last_seq bigint;
  last_created_at timestamptz;
  stored_keys text[];
  key_is_known boolean;
  -- What this call writes:
  entries ledger.entry[];
  entry ledger.entry;
  entry_id uuid;
  entry_at timestamptz;
  declined ledger.debit[];
  repeated ledger.debit[];
  repeated_outcomes jsonb[];
  outcomes jsonb[];
begin
  select array_agg(id), array_agg(item.price), array_agg(active)
  into item_ids, prices, items_are_active
  from public."Items" as item
  where id = any(locked_items);

  foreach debit in array debits loop
    -- 1. Read.
    if debit.user_id is distinct from charged_user then
      select seq, balance_after, created_at into last_seq, last_balance, last_created_at
      from public."Transaction_History"
      where user_id = debit.user_id
      order by seq desc
      limit 1;
      charged_user := debit.user_id;
      new_balance := debit.balance;
      stored_keys := '{}';
    elsif debit.idempotency_key = any(stored_keys) then
      -- The first debit with this key decides. Its outcome is stored below.
      repeated := repeated || debit;
      continue;
    end if;
    perform from public."Transaction_History"
    where user_id = debit.user_id and idempotency_key = debit.idempotency_key
    union all
    select from ledger.declines
    where user_id = debit.user_id and idempotency_key = debit.idempotency_key;
    key_is_known := found;
    item_place := array_position(item_ids, debit.item_id);
    price := prices[item_place];

    -- 2. Decide.
    if key_is_known then
      stored := ledger.find_outcome(debit.user_id, debit.idempotency_key);
      result := case
        when (stored ->> 'item_id')::uuid is not distinct from debit.item_id
          and (stored ->> 'expected_price')::bigint is not distinct from debit.expected_price
          and coalesce(stored ->> 'actor' = debit.actor, true) then 'replayed'
        else 'idempotency_key_reused'
      end;
    else
      result := case
        when not debit.user_is_locked then 'user_not_found'
        when not debit.user_is_active then 'user_inactive'
        when item_place is null then 'item_not_found'
        when not items_are_active[item_place] then 'item_inactive'
        when price <> debit.expected_price then 'price_changed'
        when price > new_balance then 'insufficient_funds'
        else 'debited'
      end;
    end if;

    if result = 'debited' then
      if debit.balance <> coalesce(last_balance, 0) then
        raise exception using
          errcode = 'check_violation',
          message = format('the balance of user %s is not that of the last entry', debit.user_id),
          hint = 'select * from audit_ledger(); see "Reading the audit" in docs/operations.md',
          schema = 'public',
          table = 'Users',
          constraint = 'users_balance_is_last_entry';
      end if;
      new_balance := new_balance - price;
      last_seq := coalesce(last_seq, 0) + 1;
      stored_keys := stored_keys || debit.idempotency_key;
      entry_id := coalesce(debit.attempt, gen_random_uuid());
      entry_at := greatest(decided_at, last_created_at);
      entries := entries || row(
        entry_id, debit.user_id, last_seq, 'debit', debit.item_id, -price, new_balance, entry_at,
        debit.idempotency_key, debit.expected_price, debit.actor
      )::ledger.entry;
      outcomes[debit.place] := jsonb_build_object(
        'outcome', result,
        'transaction_id', entry_id,
        'user_id', debit.user_id,
        'item_id', debit.item_id,
        'expected_price', debit.expected_price,
        'amount', price,
        'new_balance', new_balance,
        'created_at', entry_at,
        'replayed', false
      );
      continue;
    end if;

    if exists (
      select from public."Users" where card_id = debit.user_id and not debit.user_is_locked
    ) or exists (
      select from public."Items" where id = debit.item_id and item_place is null
    ) then
      result := 'busy';
    end if;
    if result = 'replayed' then
      outcomes[debit.place] := stored;
      continue;
    end if;
    outcomes[debit.place] := jsonb_build_object(
      'outcome', result,
      'item_id', debit.item_id,
      'expected_price', debit.expected_price,
      'replayed', false
    );
    if result = 'price_changed' then
      outcomes[debit.place] := outcomes[debit.place] || jsonb_build_object('price', price);
    end if;
    if debit.idempotency_key is not null
      and result not in ('busy', 'user_not_found', 'idempotency_key_reused') then
      declined := declined || debit;
      stored_keys := stored_keys || debit.idempotency_key;
    end if;
  end loop;

  -- 3. Write. The last entry of a user has the new balance.
  if entries is not null then
    insert into public."Transaction_History" (
      id, user_id, seq, kind, item, amount_delta, balance_after, created_at, idempotency_key,
      expected_price, actor
    )
    select * from unnest(entries);
    for number in 1..cardinality(entries) loop
      entry := entries[number];
      if entry.user_id is distinct from entries[number + 1].user_id then
        update public."Users" set balance = entry.balance_after where card_id = entry.user_id;
      end if;
    end loop;
  end if;
  if declined is not null then
    insert into ledger.declines (
      user_id, idempotency_key, outcome, item_id, expected_price, price, attempt, actor
    )
    select
      request.user_id,
      request.idempotency_key,
      outcomes[request.place] ->> 'outcome',
      request.item_id,
      request.expected_price,
      (outcomes[request.place] ->> 'price')::bigint,
      request.attempt,
      request.actor
    from unnest(declined) as request;
  end if;

  -- 4. A repeated key finds the outcome that step 3 has stored.
  if repeated is not null then
    repeated_outcomes := ledger.charge(repeated, locked_items);
    foreach debit in array repeated loop
      outcomes[debit.place] := repeated_outcomes[debit.place];
    end loop;
  end if;
  return outcomes;
end
$$;

-- Charge one user for one item. With the user as its first argument, Citus can run the whole debit
-- on the node of the user. Citus does not pass the lock_timeout of the caller on.
create or replace function ledger.debit(
  user_id_input bigint,
  item_input uuid,
  idempotency_key_input text,
  expected_price_input bigint,
  attempt_input uuid,
  actor_input text
) returns jsonb
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '2s'
as $$
declare
  is_active boolean;
  balance_now bigint;
begin
  -- Debits of one user wait for each other here. Debits of one item do not wait.
  select active, balance into is_active, balance_now from public."Users"
  where card_id = user_id_input
  for no key update;
  return (
    ledger.charge(
      array[
        row(
          1, user_id_input, item_input, coalesce(idempotency_key_input, attempt_input::text),
          expected_price_input, attempt_input, actor_input, found, is_active, balance_now
        )::ledger.debit
      ],
      array[item_input]
    )
  )[1];
end
$$;

create or replace function public.debit_use(
  user_id_input bigint,
  item_input uuid,
  idempotency_key_input text default null,
  expected_price_input bigint default null,
  attempt_input uuid default null,
  actor_input text default null
) returns jsonb
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '2s'
set statement_timeout = '4s'
as $$
begin
  -- Citus sends a call of this form to the node of the user.
  return (
    select outcome from ledger.debit(
      user_id_input, item_input, idempotency_key_input, expected_price_input, attempt_input,
      actor_input
    ) as debit (outcome)
  );
end
$$;

-- Users are locked one by one, because Citus refuses a lock on the rows of several nodes.
create or replace function public.debit_use_batch(debits jsonb) returns jsonb
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '100ms'
set statement_timeout = '4s'
as $$
declare
  request record;
  locked_user bigint;
  is_locked boolean := false;
  is_active boolean;
  balance_now bigint;
  locked_debits ledger.debit[] := '{}';
  item_ids uuid[] := '{}';
  locked_items uuid[];
begin
  -- Lock the users in the order of their ids, so that no two batches wait for each other. Skip rows
  -- that another transaction has locked, so that one locked user does not delay the others.
  for request in
    select * from rows from (
      jsonb_to_recordset(debits) as (
        user_id bigint, item_id uuid, idempotency_key text, expected_price bigint, attempt uuid,
        actor text
      )
    ) with ordinality as request (
      user_id, item_id, idempotency_key, expected_price, attempt, actor, place
    )
    order by user_id, place
  loop
    if request.user_id is distinct from locked_user then
      locked_user := request.user_id;
      select active, balance into is_active, balance_now from public."Users"
      where card_id = locked_user
      for no key update skip locked;
      is_locked := found;
    end if;
    locked_debits := locked_debits || row(
      request.place, request.user_id, request.item_id,
      coalesce(request.idempotency_key, request.attempt::text), request.expected_price,
      request.attempt, request.actor, is_locked, is_active, balance_now
    )::ledger.debit;
    item_ids := item_ids || request.item_id;
  end loop;

  -- The same lock that the foreign key of an entry takes. The foreign key would wait for it.
  select array_agg(id) into locked_items
  from (
    select id from public."Items"
    where id = any(item_ids)
    order by id
    for key share skip locked
  ) as locked;
  return coalesce(to_jsonb(ledger.charge(locked_debits, locked_items)), '[]');
end
$$;

create or replace function public.find_payment(
  user_id_input bigint, idempotency_key_input text
) returns jsonb
language sql stable security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '2s'
set statement_timeout = '4s'
as $$
  select ledger.find_outcome(user_id_input, idempotency_key_input)
$$;

comment on function ledger.find_outcome is
'Return the outcome stored for a key of a user as a replay, or null.';
comment on function ledger.charge is
'Decide all debits of a call by the rules of a debit, and write entries, balances and declines.';
comment on function ledger.debit is
'Lock a user and charge the user for an item; returns the outcome.';
comment on function public.debit_use is
'Charge a user for an item at its present price, in one transaction; returns the outcome.';
comment on function public.debit_use_batch is
'Charge debits by the rules of debit_use, in one transaction; returns the outcomes in order.';
comment on function public.find_payment is
'Return the outcome stored for a key of a user, or null; only reads.';

revoke all on type ledger.debit, ledger.entry
from public, anon, authenticated, service_role;
revoke all on function
ledger.find_outcome(bigint, text),
ledger.charge(ledger.debit[], uuid[]),
ledger.debit(bigint, uuid, text, bigint, uuid, text),
public.debit_use(bigint, uuid, text, bigint, uuid, text),
public.debit_use_batch(jsonb),
public.find_payment(bigint, text)
from public, anon, authenticated, service_role;

grant execute on function
public.debit_use(bigint, uuid, text, bigint, uuid, text),
public.debit_use_batch(jsonb),
public.find_payment(bigint, text)
to service_role;

commit;
