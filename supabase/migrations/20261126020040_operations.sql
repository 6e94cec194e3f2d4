-- Functions for the operation of the ledger:
--   remove_generated_declines  removes old declines with generated keys; called by the service
--   check_ledger               checks that debits can work; called by the service at startup
--   audit_ledger               checks that entries and balances agree; called by the operator
--   ledger.append              corrects a balance; called by the owner of the tables

begin;

do $$
begin
  if obj_description(to_regnamespace('ledger'), 'pg_namespace') is null
    or to_regtype('ledger.debit') is null then
    raise exception using
      errcode = 'object_not_in_prerequisite_state',
      message = 'The migration before this one was not applied. Apply the files in order, and read the '
      'message of the first file that fails.';
  end if;
end
$$;

-- Write one entry and the new balance; return the id of the entry.
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
  balance_before bigint;
  last_entry record;
  entry_id uuid := gen_random_uuid();
begin
  select balance into balance_before from public."Users"
  where card_id = user_id_input
  for no key update;
  select seq, created_at into last_entry from public."Transaction_History"
  where user_id = user_id_input
  order by seq desc
  limit 1;
  insert into public."Transaction_History" (
    id, user_id, seq, kind, item, amount_delta, balance_after, created_at, idempotency_key
  ) values (
    entry_id,
    user_id_input,
    coalesce(last_entry.seq, 0) + 1,
    kind_input,
    item_input,
    amount_delta_input,
    balance_before + amount_delta_input,
    greatest(clock_timestamp(), last_entry.created_at),
    idempotency_key_input
  );
  update public."Users" set balance = balance + amount_delta_input where card_id = user_id_input;
  return entry_id;
end
$$;

-- If a caller sends no key, the key is the attempt's id, which the caller does not know. Only the
-- call itself uses it, and no call takes a day, so older declines are not needed.
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

-- Check that tables, columns, indexes and triggers are as a debit needs them. An exception lists
-- the differences.
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
      'column %s of %s must not be null, but a debit does not set it', attname, attrelid::regclass
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
            -- In the entry of a debit, other columns are null or have generated values.
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
      hint = 'Apply the migrations again; their check lists the fixes.';
  end if;
  return jsonb_build_object('outcome', 'ready');
end
$$;

-- Return other objects that could bypass the rules of the ledger: triggers on its tables, and
-- objects that anon or authenticated can use. The check in the first migration has the same query
-- for the latter. The query does not find functions in C, or functions that build the names of
-- tables at run time.
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

  -- Objects that read or write the tables of the ledger, directly or through others: views and rules
  -- by dependencies, functions by the names in their source, tables by their triggers.
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

  -- The API roles that can use an object, such as 'anon and authenticated'.
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
  -- Triggers on the tables, except those of the ledger, of PostgreSQL, of extensions and webhooks.
  -- A trigger is harmless if its source uses neither the tables nor their amounts.
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

comment on function ledger.append is
'Write one entry and the new balance, as a correction; return the id of the entry.';
comment on function ledger.find_foreign_access is
'Return other objects that could bypass the rules of the ledger, and the fixes.';
comment on function public.remove_generated_declines is
'Remove declines with generated keys that are older than a day; return how many were removed.';
comment on function public.check_ledger is
'Raise an exception that lists what prevents debits, such as a missing column; only reads.';
comment on function public.audit_ledger is
'Return users whose entries and balance do not agree and, with a null user, other objects that '
'could bypass the rules; no rows if there are no faults.';

revoke all on function
ledger.append(bigint, text, bigint, uuid, text),
ledger.find_foreign_access(),
public.remove_generated_declines(integer),
public.check_ledger(),
public.audit_ledger()
from public, anon, authenticated, service_role;

grant execute on function
public.remove_generated_declines(integer),
public.check_ledger(),
public.audit_ledger()
to service_role;

commit;

notify pgrst, 'reload schema';
