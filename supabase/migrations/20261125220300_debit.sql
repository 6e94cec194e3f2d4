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

-- Decide all debits of a call by the rules, in the order given, and write the results. One query
-- reads, and one statement per table writes (balances: one per user).
--
-- The debits of a user follow each other, in the order of their places. The caller has locked the
-- users of debits with user_is_locked, and nobody can remove the items in locked_items. A debit
-- whose user or item exists but is not locked is busy. The result has each outcome at the place of
-- its debit.
--
-- PostgreSQL initialises each expression once per transaction. With three or four more expressions
-- here or in the triggers, the memory of a single debit passes 128 KiB, the allocator of glibc
-- returns it to the system after each call, and the call costs 10 % more (measured: page faults).
create or replace function ledger.charge(
  debits ledger.debit[], locked_items uuid[]
) returns jsonb[]
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan -- planning takes longer than running
as $$
declare
  decided_at timestamptz := clock_timestamp();
  debit record;
  stored jsonb;
  result text;
  -- What this call has decided so far for the user of the debit:
  charged_user bigint;
  new_balance bigint;
  last_seq bigint;
  stored_keys text[];
  -- What this call writes:
  entries ledger.entry[];
  entry ledger.entry;
  declined integer[];
  repeated ledger.debit[];
  repetition ledger.debit;
  repeated_outcomes jsonb[];
  outcomes jsonb[];
begin
  -- 1. Read. With "limit 1", the joined subqueries stay look-ups in an index.
  for debit in
    select
      request.*,
      coalesce(request.attempt, gen_random_uuid()) as entry_id,
      greatest(decided_at, last_entry.created_at) as created_at,
      coalesce(last_entry.seq, 0) as last_seq,
      coalesce(last_entry.balance_after, 0) as last_balance,
      item.id as locked_item,
      item.active as item_is_active,
      item.price,
      coalesce(
        (
          select true from public."Transaction_History" as payment
          where payment.user_id = request.user_id
            and payment.idempotency_key = request.idempotency_key
        ),
        (
          select true from ledger.declines as decline
          where decline.user_id = request.user_id
            and decline.idempotency_key = request.idempotency_key
        )
      ) as key_is_known
    from unnest(debits) with ordinality as request (
      place, user_id, item_id, idempotency_key, expected_price, attempt, actor, user_is_locked,
      user_is_active, balance, number
    )
    left join lateral (
      select seq, balance_after, created_at from public."Transaction_History"
      where user_id = request.user_id
      order by seq desc
      limit 1
    ) as last_entry on true
    left join lateral (
      select id, active, price from public."Items"
      where id = request.item_id and id = any(locked_items)
      limit 1
    ) as item on true
    order by request.number
  loop
    if debit.user_id is distinct from charged_user then
      charged_user := debit.user_id;
      new_balance := debit.balance;
      last_seq := debit.last_seq;
      stored_keys := '{}';
    elsif debit.idempotency_key = any(stored_keys) then
      -- The first debit with this key decides. Its outcome is stored below.
      repeated := repeated || debits[debit.number];
      continue;
    end if;

    -- 2. Decide.
    if debit.key_is_known then
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
        when debit.locked_item is null then 'item_not_found'
        when not debit.item_is_active then 'item_inactive'
        when debit.price <> debit.expected_price then 'price_changed'
        when debit.price > new_balance then 'insufficient_funds'
        else 'debited'
      end;
    end if;

    if result = 'debited' then
      if debit.balance <> debit.last_balance then
        raise exception using
          errcode = 'check_violation',
          message = format('the balance of user %s is not that of the last entry', debit.user_id),
          hint = 'select * from audit_ledger(); see "Reading the audit" in docs/operations.md',
          schema = 'public',
          table = 'Users',
          constraint = 'users_balance_is_last_entry';
      end if;
      new_balance := new_balance - debit.price;
      last_seq := last_seq + 1;
      stored_keys := stored_keys || debit.idempotency_key;
      entries := entries || row(
        debit.entry_id, debit.user_id, last_seq, 'debit', debit.item_id, -debit.price, new_balance,
        debit.created_at, debit.idempotency_key, debit.expected_price, debit.actor
      )::ledger.entry;
      outcomes[debit.place] := jsonb_build_object(
        'outcome', result,
        'transaction_id', debit.entry_id,
        'user_id', debit.user_id,
        'item_id', debit.item_id,
        'expected_price', debit.expected_price,
        'amount', debit.price,
        'new_balance', new_balance,
        'created_at', debit.created_at,
        'replayed', false
      );
      continue;
    end if;

    if exists (
      select from public."Users" where card_id = debit.user_id and not debit.user_is_locked
    ) or exists (
      select from public."Items" where id = debit.item_id and debit.locked_item is null
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
      outcomes[debit.place] := outcomes[debit.place] || jsonb_build_object('price', debit.price);
    end if;
    if debit.idempotency_key is not null
      and result not in ('busy', 'user_not_found', 'idempotency_key_reused') then
      declined := declined || debit.number::integer;
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
    from unnest(declined) as number
    cross join lateral unnest(debits[number:number]) as request;
  end if;

  -- 4. A repeated key finds the outcome that step 3 has stored.
  if repeated is not null then
    repeated_outcomes := ledger.charge(repeated, locked_items);
    foreach repetition in array repeated loop
      outcomes[repetition.place] := repeated_outcomes[repetition.place];
    end loop;
  end if;
  return outcomes;
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

create or replace function public.debit_use_batch(debits jsonb) returns jsonb
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '100ms'
set statement_timeout = '4s'
as $$
declare
  locked_debits ledger.debit[];
  locked_items uuid[];
begin
  -- Lock the users in the order of their ids, so that no two batches wait for each other. Skip rows
  -- that another transaction has locked, so that one locked user does not delay the others.
  with request as materialized (
    select * from rows from (
      jsonb_to_recordset(debits) as (
        user_id bigint, item_id uuid, idempotency_key text, expected_price bigint, attempt uuid,
        actor text
      )
    ) with ordinality as request (
      user_id, item_id, idempotency_key, expected_price, attempt, actor, place
    )
  ),

  locked_user as materialized (
    select users.card_id, users.active, users.balance
    from (select distinct request.user_id from request order by request.user_id) as wanted
    cross join lateral (
      select card_id, active, balance from public."Users"
      where card_id = wanted.user_id
      for no key update skip locked
    ) as users
  )

  select array_agg(
    row(
      request.place, request.user_id, request.item_id,
      coalesce(request.idempotency_key, request.attempt::text), request.expected_price,
      request.attempt, request.actor, locked_user.card_id is not null, locked_user.active,
      locked_user.balance
    )::ledger.debit
    order by request.user_id, request.place
  ) into locked_debits
  from request
  left join locked_user on request.user_id = locked_user.card_id;

  -- The same lock that the foreign key of an entry takes. The foreign key would wait for it.
  select array_agg(locked.id) into locked_items
  from (
    select distinct debit.item_id from unnest(locked_debits) as debit order by debit.item_id
  ) as wanted
  cross join lateral (
    select id from public."Items" where id = wanted.item_id for key share skip locked
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
