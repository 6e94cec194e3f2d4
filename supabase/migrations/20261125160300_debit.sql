-- Charging a user for an item. The service calls debit_use, debit_use_batch, find_payment and
-- check_ledger, nothing else.
--
-- Outcomes, in the order of checking:
--   user_not_found          no such user; not stored
--   (an earlier outcome)    the key was used before for the same item and expected price
--   idempotency_key_reused  the key was used before for something else
--   user_inactive           the user is deactivated
--   item_not_found          no such item
--   item_inactive           the item is not for sale
--   price_changed           the caller expected another price; carries "price"
--   insufficient_funds      the balance is lower than the price
--   debited                 the entry and the new balance are written
-- and of debit_use_batch alone:
--   busy                    another transaction holds the row of the user or the item; nothing was
--                           done
--
-- Declines are returned, not raised: an exception would roll back the stored decline.
-- attempt is an id that the service makes for each request. It becomes the id of the entry, so the
-- service can tell a replay of its own lost response from that of an earlier request. It is also
-- the key of a debit that comes without one.
-- actor is who asks, if the service knows. The keys of two tills can collide, so a key that another
-- actor used is reused, not replayed.
-- Exceptions are for failures: a balance that differs from the user's last entry (after a restore,
-- or a write past the triggers) raises check_violation, and the debit overwrites nothing.

begin;

-- Nothing is done unless the file before was applied. An older debit_use would make the call
-- ambiguous to PostgREST, or return something else.
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
end
$$;

-- A debit of debit_use_batch has members of these names. An entry has the columns that are written;
-- the table may have others.
do $$
begin
  if to_regtype('ledger.debit_request') is null then
    create type ledger.debit_request as (
      user_id bigint,
      item_id uuid,
      idempotency_key text,
      expected_price bigint,
      attempt uuid,
      actor text
    );
  end if;
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

-- Returns the outcome that was stored for a key of a user, or null.
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

-- Writes entries, user by user and each after the one that it continues, and the balances that
-- follow from them. The caller holds the users' rows.
create or replace function ledger.write_entries(entries ledger.entry[]) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  entry ledger.entry;
begin
  insert into public."Transaction_History" (
    id, user_id, seq, kind, item, amount_delta, balance_after, created_at, idempotency_key,
    expected_price, actor
  )
  select * from unnest(entries);

  for place in 1..cardinality(entries) loop
    entry := entries[place];
    if entry.user_id is distinct from entries[place + 1].user_id then
      update public."Users" set balance = entry.balance_after where card_id = entry.user_id;
    end if;
  end loop;
end
$$;

-- The rules, over all debits of a call: everything is read once, decided in memory in the order
-- given, and written once. The caller has locked the rows of locked_users, and nobody can remove
-- those of locked_items. A debit of another user or item that exists is busy.
create or replace function ledger.charge(
  debits ledger.debit_request[], locked_users bigint[], locked_items uuid[]
) returns jsonb[]
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan -- to plan the query anew takes longer than to run it
as $$
declare
  debit record;
  earlier jsonb;
  result text;
  last_entry ledger.entry; -- of the debit's user
  user_keys text[]; -- those of the debit's user whose outcomes this call stores
  entries ledger.entry[] := '{}';
  declined integer[] := '{}';
  repeated integer[] := '{}';
  repeats ledger.debit_request[] := '{}';
  repeat_answers jsonb[];
  answers jsonb[] := array_fill(null::jsonb, array[cardinality(debits)]);
begin
  for debit in
    -- With its limit, each subquery is a look-up by index, whatever the planner knows of the table.
    select
      request.user_id,
      request.item_id,
      coalesce(request.idempotency_key, request.attempt::text) as idempotency_key,
      request.expected_price,
      request.attempt,
      request.actor,
      request.place,
      buyer.card_id as locked_user,
      buyer.active as user_is_active,
      buyer.balance,
      coalesce(latest.balance_after, 0) as last_balance,
      coalesce(latest.seq, 0) as last_seq,
      latest.created_at as last_created_at,
      item.id as locked_item,
      item.active as item_is_active,
      item.price,
      stored.is_known_key
    from unnest(debits) with ordinality
      as request (user_id, item_id, idempotency_key, expected_price, attempt, actor, place)
    left join lateral (
      select card_id, active, balance from public."Users"
      where card_id = request.user_id and card_id = any(locked_users)
      limit 1
    ) as buyer on true
    left join lateral (
      select seq, balance_after, created_at from public."Transaction_History"
      where user_id = request.user_id
      order by seq desc
      limit 1
    ) as latest on true
    left join lateral (
      select id, active, price from public."Items"
      where id = request.item_id and id = any(locked_items)
      limit 1
    ) as item on true
    left join lateral (
      select true as is_known_key from public."Transaction_History"
      where user_id = request.user_id
        and idempotency_key = coalesce(request.idempotency_key, request.attempt::text)
      union all
      select true from ledger.declines
      where user_id = request.user_id
        and idempotency_key = coalesce(request.idempotency_key, request.attempt::text)
      limit 1
    ) as stored on true
    order by request.user_id, request.place
  loop
    if debit.user_id is distinct from last_entry.user_id then
      last_entry := row(
        null, debit.user_id, debit.last_seq, null, null, null, debit.balance,
        greatest(clock_timestamp(), debit.last_created_at), null, null, null
      );
      user_keys := '{}';
    end if;

    -- The second use of a key is decided once the outcome of the first is stored.
    if debit.idempotency_key = any(user_keys) then
      repeated := repeated || debit.place::integer;
      repeats := repeats || debits[debit.place];
      continue;
    end if;

    earlier := null;
    if debit.is_known_key then
      earlier := ledger.find_outcome(debit.user_id, debit.idempotency_key);
    end if;
    result := case
      when debit.locked_user is null then 'user_not_found'
      when earlier is not null then case
        when (earlier ->> 'item_id')::uuid is not distinct from debit.item_id
          and (earlier ->> 'expected_price')::bigint is not distinct from debit.expected_price
          and coalesce(earlier ->> 'actor' = debit.actor, true) then 'replayed'
        else 'idempotency_key_reused'
      end
      when not debit.user_is_active then 'user_inactive'
      when debit.locked_item is null then 'item_not_found'
      when not debit.item_is_active then 'item_inactive'
      when debit.price <> debit.expected_price then 'price_changed'
      when debit.price > last_entry.balance_after then 'insufficient_funds'
      else 'debited'
    end;
    if debit.locked_user is null or debit.locked_item is null then
      if exists (
        select from public."Users" where card_id = debit.user_id and debit.locked_user is null
      ) or exists (
        select from public."Items" where id = debit.item_id and debit.locked_item is null
      ) then
        result := 'busy';
      end if;
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
      last_entry := row(
        coalesce(debit.attempt, gen_random_uuid()), debit.user_id, last_entry.seq + 1, 'debit',
        debit.item_id, -debit.price, last_entry.balance_after - debit.price, last_entry.created_at,
        debit.idempotency_key, debit.expected_price, debit.actor
      );
      entries := entries || last_entry;
      user_keys := user_keys || debit.idempotency_key;
      answers[debit.place] := jsonb_build_object(
        'outcome', result,
        'transaction_id', last_entry.id,
        'user_id', debit.user_id,
        'item_id', debit.item_id,
        'expected_price', debit.expected_price,
        'amount', debit.price,
        'new_balance', last_entry.balance_after,
        'created_at', last_entry.created_at,
        'replayed', false
      );
    elsif result = 'replayed' then
      answers[debit.place] := earlier;
    else
      answers[debit.place] := jsonb_strip_nulls(
        jsonb_build_object('price', case result when 'price_changed' then debit.price end)
      ) || jsonb_build_object(
        'outcome', result,
        'item_id', debit.item_id,
        'expected_price', debit.expected_price,
        'replayed', false
      );
      if debit.idempotency_key is not null
        and result not in ('busy', 'user_not_found', 'idempotency_key_reused') then
        declined := declined || debit.place::integer;
        user_keys := user_keys || debit.idempotency_key;
      end if;
    end if;
  end loop;

  if cardinality(entries) > 0 then
    perform ledger.write_entries(entries);
  end if;
  if cardinality(declined) > 0 then
    insert into ledger.declines (
      user_id, idempotency_key, outcome, item_id, expected_price, price, attempt, actor
    )
    select
      (debits[place]).user_id,
      coalesce((debits[place]).idempotency_key, (debits[place]).attempt::text),
      answers[place] ->> 'outcome',
      (debits[place]).item_id,
      (debits[place]).expected_price,
      (answers[place] ->> 'price')::bigint,
      (debits[place]).attempt,
      (debits[place]).actor
    from unnest(declined) as place;
  end if;
  if cardinality(repeats) > 0 then
    repeat_answers := ledger.charge(repeats, locked_users, locked_items);
    for number in 1..cardinality(repeats) loop
      answers[repeated[number]] := repeat_answers[number];
    end loop;
  end if;
  return answers;
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
  locked_user bigint;
begin
  -- Debits of one user wait for each other here; buyers of one item never do.
  select card_id into locked_user from public."Users"
  where card_id = user_id_input
  for no key update;
  return (
    ledger.charge(
      array[
        row(
          user_id_input, item_input, idempotency_key_input, expected_price_input, attempt_input,
          actor_input
        )::ledger.debit_request
      ],
      array[locked_user],
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
  requests ledger.debit_request[];
  locked_users bigint[];
  locked_items uuid[];
begin
  requests := array(
    select request from jsonb_populate_recordset(null::ledger.debit_request, debits) as request
  );
  -- In the order of their ids, so that no two batches wait for each other. A row that another
  -- transaction holds is skipped, so that one locked user does not delay the others.
  select array_agg(locked.card_id) into locked_users
  from (
    select distinct request.user_id from unnest(requests) as request order by request.user_id
  ) as wanted
  cross join lateral (
    select card_id from public."Users"
    where card_id = wanted.user_id
    for no key update skip locked
  ) as locked;
  -- The same lock that the foreign key of an entry takes, and would wait for.
  select array_agg(locked.id) into locked_items
  from (
    select distinct request.item_id from unnest(requests) as request order by request.item_id
  ) as wanted
  cross join lateral (
    select id from public."Items" where id = wanted.item_id for key share skip locked
  ) as locked;
  return to_jsonb(ledger.charge(requests, locked_users, locked_items));
end
$$;

-- Writes one entry, for corrections by the tables' owner. Returns its id.
create or replace function ledger.append(
  user_id_input bigint,
  kind_input text,
  amount_delta_input bigint,
  item_input uuid default null,
  idempotency_key_input text default null
) returns uuid
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  entry ledger.entry;
begin
  select balance into entry.balance_after from public."Users"
  where card_id = user_id_input
  for no key update;
  select seq, created_at into entry.seq, entry.created_at from public."Transaction_History"
  where user_id = user_id_input
  order by seq desc
  limit 1;
  entry := row(
    gen_random_uuid(), user_id_input, coalesce(entry.seq, 0) + 1, kind_input, item_input,
    amount_delta_input, entry.balance_after + amount_delta_input,
    greatest(clock_timestamp(), entry.created_at), idempotency_key_input, null, null
  );
  perform ledger.write_entries(array[entry]);
  return entry.id;
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

-- The callers of debits without a key do not know the attempt's id, which is their key, and no call
-- is under way for a day: nobody asks for these declines any more.
create or replace function public.remove_generated_declines(rows_max integer) returns integer
language sql volatile security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '2s'
set statement_timeout = '4s'
as $$
  with removed as (
    delete from ledger.declines
    where (user_id, idempotency_key) in (
      select user_id, idempotency_key from ledger.declines
      where idempotency_key = attempt::text and created_at < now() - interval '1 day'
      order by created_at
      limit rows_max
      for update skip locked
    )
    returning 1
  )

  select count(*)::integer from removed
$$;

-- What the service asks before it takes debits: whether everything that a debit reads and writes is
-- as the functions expect it. Raises what is wrong.
create or replace function public.check_ledger() returns jsonb
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '2s'
set statement_timeout = '4s'
as $$
declare
  faults text;
begin
  select string_agg(fault, '; ' order by fault) into faults from (
    select format('column %s of %s should be %s', wanted.column_name, wanted.table_name, wanted.type)
      as fault
    from (values
      ('public."Users"', 'card_id', 'bigint'),
      ('public."Users"', 'balance', 'bigint'),
      ('public."Users"', 'active', 'boolean'),
      ('public."Items"', 'id', 'uuid'),
      ('public."Items"', 'price', 'bigint'),
      ('public."Items"', 'active', 'boolean'),
      ('public."Transaction_History"', 'id', 'uuid'),
      ('public."Transaction_History"', 'user_id', 'bigint'),
      ('public."Transaction_History"', 'item', 'uuid'),
      ('public."Transaction_History"', 'amount_delta', 'bigint'),
      ('public."Transaction_History"', 'created_at', 'timestamp with time zone'),
      ('public."Transaction_History"', 'seq', 'bigint'),
      ('public."Transaction_History"', 'kind', 'text'),
      ('public."Transaction_History"', 'balance_after', 'bigint'),
      ('public."Transaction_History"', 'idempotency_key', 'text'),
      ('public."Transaction_History"', 'expected_price', 'bigint'),
      ('public."Transaction_History"', 'actor', 'text'),
      ('ledger.declines', 'user_id', 'bigint'),
      ('ledger.declines', 'idempotency_key', 'text'),
      ('ledger.declines', 'outcome', 'text'),
      ('ledger.declines', 'item_id', 'uuid'),
      ('ledger.declines', 'expected_price', 'bigint'),
      ('ledger.declines', 'price', 'bigint'),
      ('ledger.declines', 'attempt', 'uuid'),
      ('ledger.declines', 'actor', 'text')
    ) as wanted (table_name, column_name, type)
    left join pg_attribute as attribute
      on attribute.attrelid = to_regclass(wanted.table_name)
      and attribute.attname = wanted.column_name and not attribute.attisdropped
    where format_type(attribute.atttypid, null) is distinct from wanted.type
    union all
    select format(
      'column %s of %s must not be null, and a debit does not fill it', attname, attrelid::regclass
    )
    from pg_attribute
    where attrelid in (
        to_regclass('public."Transaction_History"'), to_regclass('ledger.declines')
      )
      and attnum > 0 and not attisdropped and attnotnull and not atthasdef and attidentity = ''
      and attname not in (
        'id', 'user_id', 'item', 'amount_delta', 'created_at', 'seq', 'kind', 'balance_after',
        'idempotency_key', 'outcome'
      )
    union all
    select format('column %s of %s may be null', attname, attrelid::regclass)
    from pg_attribute
    where not attnotnull and not attisdropped
      and (
        (
          attrelid = to_regclass('public."Users"') and attname in ('card_id', 'balance', 'active')
        )
        or (attrelid = to_regclass('public."Items"') and attname in ('id', 'price', 'active'))
        or (
          attrelid = to_regclass('public."Transaction_History"')
          and attname in (
            'id', 'user_id', 'amount_delta', 'created_at', 'seq', 'kind', 'balance_after'
          )
        )
      )
    union all
    select 'column id of public."Transaction_History" has no default'
    from pg_attribute
    where attrelid = to_regclass('public."Transaction_History"') and attname = 'id'
      and not atthasdef
    union all
    select format(
      'unique index %s of public."Transaction_History" could reject a debit', index.indexrelid::regclass
    )
    from pg_index as index
    where index.indrelid = to_regclass('public."Transaction_History"') and index.indisunique
      and not exists (
        select from pg_attribute as attribute
        where attribute.attrelid = index.indrelid and attribute.attnum = any(index.indkey)
          and (
            attribute.attname in ('id', 'seq', 'idempotency_key') or attribute.attidentity <> ''
            -- A debit leaves a column of others null, or it has its own number.
            or attribute.attname not in (
              'user_id', 'item', 'amount_delta', 'created_at', 'kind', 'balance_after',
              'expected_price', 'actor'
            )
          )
      )
    union all
    select format('trigger %s of %s is missing or disabled', wanted.name, wanted.table_name)
    from (values
      ('public."Users"', 'explain_balance'),
      ('public."Users"', 'explain_first_balance'),
      ('public."Transaction_History"', 'verify_entry'),
      ('public."Transaction_History"', 'refuse_change'),
      ('public."Transaction_History"', 'refuse_truncate'),
      ('ledger.declines', 'refuse_change'),
      ('ledger.declines', 'refuse_removal'),
      ('ledger.declines', 'refuse_truncate')
    ) as wanted (table_name, name)
    where not exists (
      select from pg_trigger
      where tgrelid = to_regclass(wanted.table_name) and tgname = wanted.name
        and tgenabled in ('O', 'A')
    )
  ) as found;
  if faults is not null then
    raise exception using
      errcode = 'object_not_in_prerequisite_state',
      message = faults,
      hint = 'Apply the migrations again; their check names what has to go.';
  end if;
  return jsonb_build_object('outcome', 'ready');
end
$$;

-- Objects of others that reach the tables of the ledger past its rules: triggers, and what anon or
-- authenticated may use. The first migration stops at the latter with the same query. A table whose
-- name is put together from parts, and functions in C, are not seen.
create or replace function ledger.find_foreign_access() returns table (fault text, fix text)
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
  with recursive tables (oid, name) as (
    select class.oid, class.relname::text from pg_class as class
    where class.oid in (
      to_regclass('public."Users"'), to_regclass('public."Items"'),
      to_regclass('public."Transaction_History"'), to_regclass('ledger.declines')
    )
  ),

  routines (oid, source) as materialized (
    select function.oid, coalesce(pg_get_function_sqlbody(function.oid), function.prosrc)
    from pg_proc as function
    where function.prokind in ('f', 'p', 'w')
      and function.pronamespace not in (
        'pg_catalog'::regnamespace, 'information_schema'::regnamespace
      )
      and not exists (
        select from pg_depend as depend
        where depend.classid = 'pg_proc'::regclass and depend.objid = function.oid
          and depend.deptype = 'e'
      )
  ),

  -- What reads or writes the tables of the ledger, directly or through others: views and rules by
  -- their dependencies, functions by the names in their source, tables by their triggers.
  reach (class, oid, name) as (
    select 'pg_class'::regclass::oid, tables.oid, tables.name from tables
    union
    select next.class, next.oid, next.name
    from reach
    cross join lateral (
      select 'pg_class'::regclass::oid as class, class.oid, class.relname::text as name
      from pg_depend as depend
      inner join pg_rewrite as rule
        on depend.classid = 'pg_rewrite'::regclass and depend.objid = rule.oid
      inner join pg_class as class on rule.ev_class = class.oid
      where depend.refclassid = 'pg_class'::regclass and reach.class = depend.refclassid
        and depend.refobjid = reach.oid
      union all
      select 'pg_class'::regclass, class.oid, class.relname::text
      from pg_trigger as trigger
      inner join pg_class as class on trigger.tgrelid = class.oid
      where reach.class = 'pg_proc'::regclass and trigger.tgfoid = reach.oid
        and not trigger.tgisinternal
      union all
      select 'pg_proc'::regclass, function.oid, function.proname::text
      from routines
      inner join pg_proc as function on routines.oid = function.oid
      where routines.source ~ (
          '(^|\W)' || regexp_replace(reach.name, '(\W)', '\\\1', 'g')
          || case reach.class when 'pg_proc'::regclass then '"?\s*\(' else '(\W|$)' end
        )
    ) as next
  ),

  -- Who can use it: 'anon and authenticated', or null.
  exposed (class, oid, roles) as (
    select reach.class, reach.oid, string_agg(role.rolname, ' and ' order by role.rolname)
    from reach
    left join pg_class as class on reach.class = 'pg_class'::regclass and reach.oid = class.oid
    left join pg_proc as function on reach.class = 'pg_proc'::regclass and reach.oid = function.oid
    inner join pg_roles as role on role.rolname in ('anon', 'authenticated')
    where has_schema_privilege(
        role.oid, coalesce(class.relnamespace, function.pronamespace), 'usage'
      )
      and case
        when class.relkind in ('v', 'm') then
          has_table_privilege(role.oid, class.oid, 'select, insert, update, delete')
          or has_any_column_privilege(role.oid, class.oid, 'select, insert, update')
        when class.relkind in ('r', 'p', 'f') then
          has_table_privilege(role.oid, class.oid, 'insert, update, delete, truncate')
          or has_any_column_privilege(role.oid, class.oid, 'insert, update')
        else has_function_privilege(role.oid, function.oid, 'execute')
      end
    group by reach.class, reach.oid
  )

  select found.fault, found.fix from (
    select
      class.oid as object,
      format(
        '%s can use view %s, which reads the tables of the ledger with the rights of its owner.',
        exposed.roles, class.oid::regclass
      ) as fault,
      format('revoke all on %s from public, anon, authenticated;', class.oid::regclass) as fix
    from exposed
    inner join pg_class as class
      on exposed.class = 'pg_class'::regclass and exposed.oid = class.oid
      and class.relkind in ('v', 'm')
    where not exists (
      select from unnest(class.reloptions) as option
      where option ~* '^security_invoker=(t|tr|tru|true|y|ye|yes|on|1)$'
    )
    union all
    select
      function.oid,
      format(
        '%s can call function %s, which runs with the rights of its owner and names the tables of '
        'the ledger%s.', exposed.roles, function.oid::regprocedure,
        case when policies.names is not null then format(
          '. Policies call it (%s), so the fix moves it to a schema that the API does not expose',
          policies.names
        ) end
      ),
      format(
        case
          when policies.names is null then
            'revoke execute on function %s from public, anon, authenticated;'
          else
            'create schema if not exists private; alter function %s set schema private;'
        end,
        function.oid::regprocedure
      )
    from exposed
    inner join pg_proc as function
      on exposed.class = 'pg_proc'::regclass and exposed.oid = function.oid
    cross join lateral (
      select string_agg(format('%I on %s', polname, polrelid::regclass), ', ') as names
      from pg_policy
      inner join pg_depend as depend
        on depend.classid = 'pg_policy'::regclass and pg_policy.oid = depend.objid
        and depend.refclassid = 'pg_proc'::regclass and depend.refobjid = function.oid
    ) as policies
    where function.prosecdef and function.prorettype <> 'trigger'::regtype
    union all
    select
      trigger.oid,
      format(
        '%s can write to %s, whose trigger %I reaches the tables of the ledger with the rights of '
        'its owner.', exposed.roles, trigger.tgrelid::regclass, trigger.tgname
      ),
      format('drop trigger %I on %s;', trigger.tgname, trigger.tgrelid::regclass)
    from exposed
    inner join pg_trigger as trigger
      on exposed.class = 'pg_class'::regclass and exposed.oid = trigger.tgrelid
    inner join pg_proc as function on trigger.tgfoid = function.oid and function.prosecdef
    inner join reach
      on reach.class = 'pg_proc'::regclass and trigger.tgfoid = reach.oid
    where not trigger.tgisinternal and trigger.tgenabled <> 'D'
      and trigger.tgrelid not in (select tables.oid from tables)
    union all
    select
      rule.oid,
      format(
        '%s can write to %s, whose rule %I reaches the tables of the ledger with the rights of its '
        'owner.', exposed.roles, rule.ev_class::regclass, rule.rulename
      ),
      format('drop rule %I on %s;', rule.rulename, rule.ev_class::regclass)
    from exposed
    inner join pg_rewrite as rule
      on exposed.class = 'pg_class'::regclass and exposed.oid = rule.ev_class
      and rule.rulename <> '_RETURN'
    where rule.ev_class not in (select tables.oid from tables)
      and exists (
        select from pg_depend as depend
        inner join reach on depend.refclassid = reach.class and depend.refobjid = reach.oid
        where depend.classid = 'pg_rewrite'::regclass and depend.objid = rule.oid
          and depend.refobjid <> rule.ev_class
      )
  ) as found
  union all
  -- Triggers on the tables, unless they are of the ledger, of PostgreSQL, of an extension or a
  -- webhook. Those whose source reaches or names nothing of the ledger do no harm.
  select
    format('Trigger %I on %I could write to the tables of the ledger.', trigger.tgname, tables.name),
    format('drop trigger %I on %s;', trigger.tgname, tables.oid::regclass)
  from pg_trigger as trigger
  inner join tables on trigger.tgrelid = tables.oid
  inner join pg_proc as function on trigger.tgfoid = function.oid
  inner join pg_namespace as namespace on function.pronamespace = namespace.oid
  inner join pg_language as language on function.prolang = language.oid
  inner join routines on function.oid = routines.oid
  where not trigger.tgisinternal and trigger.tgenabled <> 'D'
    and (namespace.nspname, function.proname) not in (
      ('ledger', 'verify_entry'), ('ledger', 'explain_balance'), ('ledger', 'refuse_change'),
      ('ledger', 'keep_key'), ('supabase_functions', 'http_request')
    )
    and (
      language.lanname in ('c', 'internal')
      or routines.source ~ '\m(balance|price|amount_delta)\M'
      or exists (
        select from reach where reach.class = 'pg_proc'::regclass and reach.oid = function.oid
      )
    )
$$;

create or replace function public.audit_ledger() returns table (user_id bigint, fault text)
language sql stable security definer
set search_path = pg_catalog, pg_temp
set statement_timeout = '10min'
as $$
  with chain as not materialized (
    select
      entry.user_id,
      entry.seq,
      entry.created_at,
      entry.balance_after,
      entry.balance_after - entry.amount_delta as balance_before,
      lag(entry.seq, 1, 0::bigint) over user_entries as seq_previous,
      lag(entry.created_at) over user_entries as created_at_previous,
      lag(entry.balance_after, 1, 0::bigint) over user_entries as balance_after_previous,
      lead(entry.seq) over user_entries is null as is_last
    from public."Transaction_History" as entry
    window user_entries as (partition by entry.user_id order by entry.seq)
  )

  select chain.user_id, 'an entry does not follow from the one before it' as fault
  from chain
  group by chain.user_id
  having bool_or(
    chain.balance_before <> chain.balance_after_previous
    or chain.seq <> chain.seq_previous + 1
    or chain.created_at < chain.created_at_previous
  )
  union all
  select users.card_id, 'the balance is not that of the last entry'
  from public."Users" as users
  left join chain on users.card_id = chain.user_id and chain.is_last
  where users.balance <> coalesce(chain.balance_after, 0)
  union all
  select null, found.fault || ' Fix: ' || found.fix from ledger.find_foreign_access() as found
$$;

comment on function ledger.find_outcome is
'The outcome stored for a key of a user, as a replay returns it.';
comment on function ledger.write_entries is
'Write entries and the balances that follow from them; the only insert of entries.';
comment on function ledger.charge is
'The rules of a debit, in one place, over all debits of a call.';
comment on function ledger.append is
'Write one entry and the balance that follows from it, as a correction; returns its id.';
comment on function ledger.find_foreign_access is
'Triggers, views and functions of others that reach the tables of the ledger past its rules.';
comment on function public.debit_use is
'Charge a user for an item at its present price, in one transaction; returns the outcome.';
comment on function public.debit_use_batch is
'Debits by the rules of debit_use, in one transaction; the outcomes are in the order given.';
comment on function public.find_payment is
'The outcome stored for a key of a user, or null; reads only.';
comment on function public.remove_generated_declines is
'Remove declines that are older than a day and whose key the service generated; returns how many.';
comment on function public.check_ledger is
'Raises what keeps debits from working: a column, a trigger; reads only.';
comment on function public.audit_ledger is
'Users whose entries or balance do not add up, and, with a null user, objects of others that reach '
'past the rules; no rows if all is well.';

revoke all on type ledger.debit_request, ledger.entry
from public, anon, authenticated, service_role;
revoke all on function
ledger.find_outcome(bigint, text),
ledger.write_entries(ledger.entry[]),
ledger.charge(ledger.debit_request[], bigint[], uuid[]),
ledger.append(bigint, text, bigint, uuid, text),
ledger.find_foreign_access(),
public.debit_use(bigint, uuid, text, bigint, uuid, text),
public.debit_use_batch(jsonb),
public.find_payment(bigint, text),
public.remove_generated_declines(integer),
public.check_ledger(),
public.audit_ledger()
from public, anon, authenticated, service_role;

grant execute on function
public.debit_use(bigint, uuid, text, bigint, uuid, text),
public.debit_use_batch(jsonb),
public.find_payment(bigint, text),
public.remove_generated_declines(integer),
public.check_ledger(),
public.audit_ledger()
to service_role;

commit;

notify pgrst, 'reload schema';
