-- Check whether the other migrations can work in this database, before they change anything.
--
-- They depend on types, keys, defaults and triggers of "Users", "Items" and "Transaction_History".
-- One message lists all obstacles and decisions, with the statements that fix them. The fixes keep
-- every user and every balance.
-- The block only reads: make check-database DATABASE_URL=... runs it alone, in a read-only
-- transaction. The other files run only if the schema exists that this file creates at its end.

begin;

set local statement_timeout = 0;

do $check$
declare
  -- The fixes must run in the order of the list: access, rules and columns first, then objects that
  -- depend on a column, then rows and types.
  obstacles text[] := '{}';
  conversions text[] := '{}';
  users regclass := to_regclass('public."Users"');
  items regclass := to_regclass('public."Items"');
  history regclass := to_regclass('public."Transaction_History"');
  user_column text := 'user_id';
  has_both_columns boolean := false;
  is_migrated boolean;
  is_readable boolean := true;
  -- Changes that the fixes make to columns.
  mapped text[] := '{}';
  references_found text[] := '{}';
  altered_tables oid[] := '{}';
  altered_columns int[] := '{}';
  to_archive text;
  to_map constant text :=
  'alter table public."Transaction_History" add column %5$I %4$s; '
  'update public."Transaction_History" as entry set %5$I = target.%3$I from public.%1$I as target '
  'where target.%2$I = entry.%6$I; '
  'alter table public."Transaction_History" rename column %6$I to %7$I; '
  'alter table public."Transaction_History" alter column %7$I drop not null, '
  'alter column %7$I drop default; '
  'alter table public."Transaction_History" rename column %5$I to %6$I; '
  'alter table public."Transaction_History" add foreign key (%6$I) references public.%1$I (%3$I);';
  -- The column that a loop handles.
  finding record;
  candidate record;
  base_type regtype;
  category "char";
  expression text;
  conversion_error text;
  foreign_keys text;
  other_tables text;
  via text;
  fix text;
  hint text;
  is_true boolean;
  has_candidate boolean;
begin
  is_migrated := 3 = (
    select count(*) from pg_attribute
    where attrelid = history and attname in ('seq', 'kind', 'balance_after') and attnotnull
  );
  if exists (
    select from pg_attribute where attrelid = history and attname = 'user' and not attisdropped
  ) then
    has_both_columns := exists (
      select from pg_attribute where attrelid = history and attname = 'user_id' and not attisdropped
    );
    user_column := case when has_both_columns then 'user_id' else 'user' end;
  end if;
  to_archive := format(
    'create schema if not exists archive; '
    'create table if not exists archive.entries_without_user (like public."Transaction_History"); '
    'insert into archive.entries_without_user select entry.* from public."Transaction_History" as '
    'entry where not exists (select from public."Users" where card_id = entry.%1$I); '
    'delete from public."Transaction_History" as entry where not exists (select from '
    'public."Users" where card_id = entry.%1$I);',
    user_column
  );

  ------------------------------------------------------------------------------------------------
  -- The server, its roles, and names that the migrations need
  ------------------------------------------------------------------------------------------------

  if current_setting('server_version_num')::int < 150000 then
    obstacles := obstacles || format(
      E'PostgreSQL %s is too old.\nFix: upgrade to PostgreSQL 15 or newer.',
      current_setting('server_version')
    );
  end if;
  for finding in
    select role, case role when 'service_role' then ' bypassrls' else '' end as attributes
    from unnest(array['anon', 'authenticated', 'service_role']) as role
    where to_regrole(role) is null
  loop
    obstacles := obstacles || format(
      E'The role %1$s of Supabase is missing.\nFix: create role %1$s nologin noinherit%2$s;',
      finding.role, finding.attributes
    );
  end loop;

  if not exists (
    select from pg_attribute
    where attrelid = to_regclass('ledger.declines') and attname = 'outcome' and not attisdropped
  ) and (
    exists (select from pg_class where relnamespace = to_regnamespace('ledger'))
    or exists (select from pg_proc where pronamespace = to_regnamespace('ledger'))
  ) then
    obstacles := obstacles || E'The schema ledger exists, but these migrations did not create it. '
    'After the fix, change the functions that name it.\n'
    'Fix: alter schema ledger rename to ledger_before;'::text;
  end if;
  for finding in
    select owners.oid::regrole::text as owner, string_agg(owned.statement, ' ') as statements
    from (
      select nspowner as owner, 'alter schema ledger' as statement from pg_namespace
      where nspname = 'ledger'
      union all
      select relowner, format('alter table %s', oid::regclass) from pg_class
      where relnamespace = to_regnamespace('ledger') and relkind in ('r', 'p')
      union all
      select relowner, format('alter type %s', reltype::regtype) from pg_class
      where relnamespace = to_regnamespace('ledger') and relkind = 'c'
      union all
      select proowner, format('alter routine %s', oid::regprocedure) from pg_proc
      where pronamespace = to_regnamespace('ledger')
        or (
          pronamespace = 'public'::regnamespace and is_migrated
          and proname in (
            'debit_use', 'debit_use_batch', 'find_payment', 'remove_generated_declines',
            'check_ledger', 'audit_ledger'
          )
        )
    ) as object
    inner join pg_roles as owners on object.owner = owners.oid
    cross join lateral (
      select format('%s owner to %I;', object.statement, current_user) as statement
    ) as owned
    where not pg_has_role(object.owner, 'usage')
    group by owners.oid
  loop
    obstacles := obstacles || format(
      E'The schema ledger or objects in it belong to %1$s, but %2$I applies the migrations. '
      '%1$s has to run the fix.\nFix: %3$s',
      finding.owner, current_user, finding.statements
    );
  end loop;

  for finding in
    select oid::regprocedure as name, proname from pg_proc
    where pronamespace = 'public'::regnamespace
      and (
        (
          not is_migrated
          and proname in (
            'debit_use_batch', 'find_payment', 'remove_generated_declines', 'check_ledger',
            'audit_ledger'
          )
        )
        or (
          proname in ('check_ledger', 'audit_ledger') and pronargs = 0
          and pg_get_function_result(oid) not in ('jsonb', 'TABLE(user_id bigint, fault text)')
        )
      )
  loop
    obstacles := obstacles || format(
      E'Function %1$s has a name that the migration needs.\nFix: alter routine %1$s rename to %2$I;',
      finding.name, finding.proname || '_before'
    );
  end loop;
  for finding in
    select oid::regclass as name, relname from pg_class
    where relnamespace = 'public'::regnamespace and not is_migrated
      and relname in (
        'transaction_history_user_id_seq_idx', 'transaction_history_user_id_idempotency_key_idx'
      )
  loop
    obstacles := obstacles || format(
      E'%1$s has a name that the migration needs.\nFix: alter table %1$s rename to %2$I;',
      finding.name, left(finding.relname, 56) || '_before'
    );
  end loop;

  ------------------------------------------------------------------------------------------------
  -- The three tables
  ------------------------------------------------------------------------------------------------

  for finding in
    select wanted.name, class.oid::regclass as existing
    from (values
      ('Users', array['card_id', 'balance']),
      ('Items', array['price', 'id']),
      ('Transaction_History', array['item', 'created_at'])
    ) as wanted (name, columns)
    inner join pg_class as class
      on lower(class.relname) = lower(wanted.name) and class.relname <> wanted.name
    where class.relnamespace = 'public'::regnamespace and class.relkind in ('r', 'p')
      and to_regclass(format('public.%I', wanted.name)) is null
      and wanted.columns <@ array(
        select attname::text from pg_attribute where attrelid = class.oid and not attisdropped
      )
  loop
    obstacles := obstacles || format(
      E'Table %2$s should be called %1$I: PostgreSQL distinguishes upper and lower case.\n'
      'Fix: alter table %2$s rename to %1$I;', finding.name, finding.existing
    );
  end loop;

  for finding in
    select class.*, class.oid from pg_class as class
    where class.oid in (users, items, history)
    order by class.oid = history -- which refers to the others
  loop
    if finding.relkind not in ('r', 'p') then
      is_readable := false;
      obstacles := obstacles || format(
        E'%1$I is not a table, but the ledger locks its rows and writes to it. After the fix, the '
        'migration creates the table.\nFix: alter %2$s public.%1$I rename to %3$I;',
        finding.relname,
        case finding.relkind
          when 'v' then 'view' when 'm' then 'materialized view' when 'S' then 'sequence'
          else 'foreign table'
        end,
        finding.relname || '_before'
      );
      continue;
    end if;
    if finding.relkind = 'p' and finding.oid = history and not is_migrated then
      is_readable := false;
      obstacles := obstacles || E'Table "Transaction_History" is partitioned, which the migration '
      'does not support. The fix copies its rows into a plain table; docs/scaling.md says how to add '
      'partitions later.\n'
      'Fix: alter table public."Transaction_History" rename to "Transaction_History_before"; '
      'create table public."Transaction_History" (like public."Transaction_History_before" '
      'including defaults including identity including generated); insert into '
      'public."Transaction_History" select * from public."Transaction_History_before";'::text;
    end if;
    if finding.relpersistence = 'u' then
      obstacles := obstacles || format(
        E'Table %1$I is unlogged, so a crash empties it.\n'
        'Fix: alter table public.%1$I set logged;', finding.relname
      );
    end if;
    if not pg_has_role(finding.relowner, 'usage') then
      is_readable := is_readable and has_table_privilege(finding.oid, 'select');
      obstacles := obstacles || format(
        E'Table %1$I belongs to %2$s, but %3$I applies the migrations. %2$s has to run the fix.\n'
        'Fix: alter table public.%1$I owner to %3$I;',
        finding.relname, finding.relowner::regrole::text, current_user
      );
    elsif row_security_active(finding.oid) then
      is_readable := false;
      obstacles := obstacles || format(
        E'Row level security hides rows of %1$I from %2$I, which applies the migrations.\n'
        'Fix: alter table public.%1$I no force row level security;', finding.relname, current_user
      );
    end if;
  end loop;

  for finding in
    select
      child.oid::regclass as child, parent.oid::regclass as parent,
      parent.oid in (users, items, history) as is_parent,
      case when parent.oid = users then 'card_id' else 'id' end as key,
      (
        select string_agg(quote_ident(attname), ', ' order by attnum) from pg_attribute
        where attrelid = parent.oid and attnum > 0 and not attisdropped and attgenerated = ''
      ) as columns
    from pg_inherits
    inner join pg_class as child on pg_inherits.inhrelid = child.oid
    inner join pg_class as parent on pg_inherits.inhparent = parent.oid
    where not child.relispartition
      and (child.oid in (users, items, history) or parent.oid in (users, items, history))
  loop
    is_readable := false;
    obstacles := obstacles || format(
      E'Table %1$s inherits from %2$s, so no key covers the rows of both.%3$s\n'
      'Fix: alter table %1$s no inherit %2$s;%4$s',
      finding.child, finding.parent,
      case when finding.is_parent then format(
        ' The fix makes %1$s a separate table, and copies its rows to %2$s, except rows whose %3$s '
        'exists there.', finding.child, finding.parent, finding.key
      ) end,
      case when finding.is_parent then format(
        ' insert into %1$s (%3$s) overriding system value select %3$s from %2$s as child where not '
        'exists (select from %1$s as parent where parent.%4$I = child.%4$I);',
        finding.parent, finding.child, finding.columns, finding.key
      ) end
    );
  end loop;

  <<readable_tables>>
  begin
  exit readable_tables when not is_readable;

  ------------------------------------------------------------------------------------------------
  -- Other rules and triggers on the three tables
  ------------------------------------------------------------------------------------------------

  for finding in
    select rulename, ev_class::regclass as name, pg_get_ruledef(oid) as definition from pg_rewrite
    where ev_class in (users, items, history) and rulename <> '_RETURN'
  loop
    obstacles := obstacles || format(
      E'Rule %1$I on %2$s changes the rows that are written: %3$s\nFix: drop rule %1$I on %2$s;',
      finding.rulename, finding.name, finding.definition
    );
  end loop;

  -- Once the database is migrated, such triggers are no obstacle: the audit lists those that could
  -- write to the tables.
  for finding in
    select trigger.tgname, trigger.tgrelid::regclass as name
    from pg_trigger as trigger
    inner join pg_proc as function on trigger.tgfoid = function.oid
    inner join pg_namespace as namespace on function.pronamespace = namespace.oid
    where trigger.tgrelid in (users, items, history) and not is_migrated
      and not trigger.tgisinternal and trigger.tgenabled <> 'D'
      and namespace.nspname <> 'pg_catalog'
      and (namespace.nspname, function.proname) <> ('supabase_functions', 'http_request')
      and (
        -- 7: before, for each row, insert.
        (trigger.tgrelid = history and trigger.tgtype & 7 = 7)
        or not exists (
          select from pg_depend as depend
          where depend.classid = 'pg_proc'::regclass and depend.objid = function.oid
            and depend.deptype = 'e'
        )
      )
  loop
    obstacles := obstacles || format(
      E'Trigger %1$I on %2$s could change or reject the rows that the ledger writes. If it does '
      'neither, create it again after the migration.\nFix: drop trigger %1$I on %2$s;',
      finding.tgname, finding.name
    );
  end loop;

  ------------------------------------------------------------------------------------------------
  -- Other views and functions that anon or authenticated can use
  ------------------------------------------------------------------------------------------------

  -- ledger.find_foreign_access() has the same query for the audit; a test compares the two.
  for finding in
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

    select found.object, found.fault, found.fix from (
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
    where found.object not in (
      select oid from pg_proc
      where pronamespace = 'public'::regnamespace
        and proname in ('debit_use', 'debit_use_batch', 'find_payment') -- replaced
    )
  loop
    obstacles := obstacles || format(E'%s\nFix: %s', finding.fault, finding.fix);
  end loop;

  ------------------------------------------------------------------------------------------------
  -- Other constraints and unique indexes that could reject a debit
  ------------------------------------------------------------------------------------------------

  -- A debit fills these columns of the history. A unique index cannot reject a debit if it has
  -- another column that is null or numbered.
  for finding in
    select
      class.relname, index.indexrelid::regclass as name, con.conname,
      coalesce(pg_get_constraintdef(con.oid), pg_get_indexdef(index.indexrelid)) as definition,
      (
        select string_agg(format(
          'alter table %s drop constraint %I; ', referring.conrelid::regclass, referring.conname
        ), '')
        from pg_constraint as referring
        where referring.contype = 'f' and referring.conindid = index.indexrelid
      ) as drop_references
    from pg_index as index
    inner join pg_class as class on index.indrelid = class.oid
    left join pg_constraint as con
      on index.indexrelid = con.conindid and con.contype in ('p', 'u', 'x')
    where (
        (index.indrelid = history and index.indisunique)
        or (
          index.indrelid = users and (index.indisunique or index.indisexclusion)
          and pg_get_indexdef(index.indexrelid) ~ '\mbalance\M'
        )
      )
      and (
        -- The item of an entry can be null.
        (index.indrelid = history and index.indisprimary and exists (
          select from pg_attribute
          where attrelid = history and attname = 'item' and attnum = any(index.indkey)
        ))
        or not exists (
          select from pg_attribute as attribute
          left join pg_attrdef as standard
            on attribute.attrelid = standard.adrelid and attribute.attnum = standard.adnum
          where attribute.attrelid = index.indrelid and attribute.attnum = any(index.indkey)
            and (
              (index.indrelid = users and attribute.attname = 'card_id')
              or (index.indrelid = history and attribute.attname in ('id', 'seq', 'idempotency_key'))
              or (
                index.indrelid = history and attribute.attgenerated = ''
                and attribute.attname not in (
                  'user_id', 'user', 'item', 'amount_delta', 'created_at', 'kind', 'balance_after',
                  'expected_price', 'actor'
                )
                and (
                  attribute.attidentity <> ''
                  or pg_get_expr(standard.adbin, standard.adrelid) ~ '^(nextval|gen_random_uuid)\('
                  or (
                    standard.oid is null and not attribute.attnotnull
                    and not index.indnullsnotdistinct
                  )
                )
              )
            )
        )
      )
  loop
    obstacles := obstacles || format(
      E'%1$s of %2$I could reject a debit: %3$s.\nFix: %4$s%5$s;',
      case
        when finding.conname is null then format('Unique index %s', finding.name)
        else format('Constraint %I', finding.conname)
      end,
      finding.relname, finding.definition, finding.drop_references,
      case
        when finding.conname is null then format('drop index %s', finding.name)
        else format('alter table public.%I drop constraint %I', finding.relname, finding.conname)
      end
    );
  end loop;

  for finding in
    select con.conname, class.relname, pg_get_constraintdef(con.oid) as definition
    from pg_constraint as con
    inner join pg_class as class on con.conrelid = class.oid
    where (
        con.conrelid = history and con.conislocal
        and con.conname not in (
          'transaction_history_kind_known', 'transaction_history_debit_takes_for_an_item',
          'transaction_history_idempotency_key_length'
        )
        and (
          con.contype in ('c', 'x')
          or (
            con.contype = 'f' and con.confrelid not in (users, items)
            and con.conkey && (
              select array_agg(attnum) from pg_attribute
              where attrelid = history and attname in ('id', 'user_id', 'user', 'item')
            )
          )
        )
      ) or (
        -- A debit updates the user's row, so the row must pass every check, not only those of the
        -- balance. A limit that no debit can exceed is harmless.
        con.conrelid = users and con.contype in ('c', 'n')
        and (
          (not con.convalidated and (con.contype = 'c' or not con.conkey <@ (
            select array_agg(attnum) from pg_attribute
            where attrelid = users and attname in ('card_id', 'balance', 'active')
          )))
          or (con.contype = 'c' and pg_get_constraintdef(con.oid) ~* '\mnow\(|\mcurrent_|timestamp\(')
          or (
            con.conkey && (
              select array_agg(attnum) from pg_attribute
              where attrelid = users and (attname = 'balance' or attgenerated <> '')
            )
            and con.contype = 'c'
            and pg_get_constraintdef(con.oid)
            !~ '^CHECK \(\({1,2}balance >=? \(?(0|''?-\d+''?)\)?(::\w+)?\)( AND \(balance <=? ''?\d+''?(::\w+)?\)\))?\)$'
          )
        )
      )
  loop
    obstacles := obstacles || format(
      E'Constraint %1$I of %2$I could reject a debit: %3$s.\n'
      'Fix: alter table public.%2$I drop constraint %1$I;',
      finding.conname, finding.relname, finding.definition
    );
  end loop;

  -- Columns that must not be null, and that a debit does not set. Only a default that cannot be null
  -- is safe: a constant, or a function of PostgreSQL or of an extension.
  for finding in
    select
      attribute.attname,
      case
        when type.typtype = 'd' then format(
          'alter column %I type %s, ', attribute.attname,
          format_type(type.typbasetype, type.typtypmod)
        )
        else ''
      end as change_type
    from pg_attribute as attribute
    inner join pg_type as type on attribute.atttypid = type.oid
    left join pg_attrdef as standard
      on attribute.attrelid = standard.adrelid and attribute.attnum = standard.adnum
    where attribute.attrelid = history and attribute.attnum > 0 and not attribute.attisdropped
      and attribute.attidentity = ''
      and attribute.attname not in (
        'id', 'user_id', 'user', 'item', 'amount_delta', 'created_at', 'seq', 'kind',
        'balance_after', 'idempotency_key', 'expected_price', 'actor'
      )
      and (
        attribute.attnotnull or type.typnotnull
        or exists (
          select from pg_constraint
          where contypid = type.oid and pg_get_constraintdef(oid) ~* 'is not null'
        )
      )
      and (
        (standard.oid is null and type.typdefault is null)
        or attribute.attgenerated <> ''
        or pg_get_expr(standard.adbin, standard.adrelid) ~ 'current_setting|^NULL'
        or exists (
          select from pg_depend as used
          where used.classid = 'pg_attrdef'::regclass and used.objid = standard.oid
            and used.refclassid = 'pg_proc'::regclass
            and not exists (
              select from pg_depend as extension
              where extension.classid = 'pg_proc'::regclass and extension.objid = used.refobjid
                and extension.deptype = 'e'
            )
        )
      )
  loop
    obstacles := obstacles || format(
      E'Column %1$I of "Transaction_History" must not be null, but a debit does not set it.\n'
      'Fix: alter table public."Transaction_History" %2$salter column %1$I drop not null;',
      finding.attname, finding.change_type
    );
  end loop;

  ------------------------------------------------------------------------------------------------
  -- Names and presence of columns
  ------------------------------------------------------------------------------------------------

  for finding in
    select attname from pg_attribute
    where attrelid = history and not attisdropped
      and (
        not is_migrated
        and attname in ('seq', 'kind', 'balance_after', 'idempotency_key', 'expected_price', 'actor')
        or attname = 'actor' and atttypid <> 'text'::regtype
      )
  loop
    obstacles := obstacles || format(
      E'Column %1$I of "Transaction_History" has a name that the migration needs.\n'
      'Fix: alter table public."Transaction_History" rename column %1$I to old_%1$s; '
      'alter table public."Transaction_History" alter column old_%1$s drop not null;',
      finding.attname
    );
  end loop;

  if has_both_columns then
    obstacles := obstacles || E'Table "Transaction_History" has both columns "user" and user_id.\n'
      'Fix: alter table public."Transaction_History" rename column "user" to old_user; '
      'alter table public."Transaction_History" alter column old_user drop not null;'::text;
  end if;

  -- The migrations do not add such a column themselves, because they cannot know its values.
  for finding in
    select
      wanted.*,
      case
        when not wanted.is_key then ''
        when exists (
          select from pg_constraint where conrelid = class.oid and contype = 'p'
        ) then ' unique'
        else ' primary key'
      end as key
    from (values
      ('Users', 'card_id', 'bigint generated by default as identity', true),
      ('Users', 'balance', 'bigint not null default 0', false),
      ('Items', 'id', 'uuid not null default gen_random_uuid()', true),
      ('Items', 'price', 'bigint not null default 0', false),
      ('Transaction_History', 'id', 'uuid not null default gen_random_uuid()', true),
      ('Transaction_History', 'user_id', 'bigint', false),
      ('Transaction_History', 'item', 'uuid', false),
      ('Transaction_History', 'created_at', 'timestamptz not null default ''2000-01-01Z''', false)
    ) as wanted (table_name, column_name, definition, is_key)
    inner join pg_class as class on class.oid = to_regclass(format('public.%I', wanted.table_name))
    where not (wanted.column_name = 'user_id' and user_column = 'user')
      and not exists (
        select from pg_attribute
        where attrelid = class.oid and attname = wanted.column_name and not attisdropped
      )
  loop
    obstacles := obstacles || format(
      E'Table %1$I has no column %2$I. If another column has these values, rename that column '
      '(alter table public.%1$I rename column ... to %2$I;); otherwise add the column.\n'
      'Fix: alter table public.%1$I add column %2$I %3$s%4$s;',
      finding.table_name, finding.column_name, finding.definition, finding.key
    );
  end loop;

  ------------------------------------------------------------------------------------------------
  -- References of the history: card_id of "Users" and id of "Items"
  ------------------------------------------------------------------------------------------------

  for finding in
    select
      wanted.*, target.oid as target_oid, attribute.attnum, attribute.atttypid,
      attribute.atttypid = any(wanted.types) as is_right_type,
      key.atttypid = any(wanted.types) as has_right_key,
      exists (
        select from pg_constraint cross join unnest(conkey, confkey) as pair (own, other)
        where conrelid = history and contype = 'f' and convalidated and confrelid = target.oid
          and pair.own = attribute.attnum and pair.other = key.attnum
      ) as refers_to_key,
      (
        select other.attname
        from pg_constraint cross join unnest(conkey, confkey) as pair (own, other)
        inner join pg_attribute as other
          on confrelid = other.attrelid and pair.other = other.attnum
        where conrelid = history and contype = 'f' and confrelid = target.oid
          and pair.own = attribute.attnum and pair.other <> key.attnum
        limit 1
      ) as other_column
    from (values
      (
        user_column, 'Users', 'card_id', 'bigint',
        array['int2'::regtype, 'int4'::regtype, 'int8'::regtype], to_archive,
        'The fix moves entries of users that do not exist to another schema'
      ),
      (
        'item', 'Items', 'id', 'uuid', array['uuid'::regtype],
        'insert into public."Items" (id, name, price, active) select distinct entry.item, '
        '''unknown'', 0, false from public."Transaction_History" as entry where entry.item is not '
        'null and not exists (select from public."Items" where id = entry.item);',
        'The fix adds the missing items, not for sale'
      )
    ) as wanted (column_name, target, key, type, types, repair, effect)
    inner join pg_class as target on target.oid = to_regclass(format('public.%I', wanted.target))
    inner join pg_attribute as key
      on key.attrelid = target.oid and key.attname = wanted.key and not key.attisdropped
    inner join pg_attribute as attribute
      on attribute.attrelid = history and attribute.attname = wanted.column_name
      and not attribute.attisdropped
  loop
    continue when finding.refers_to_key;
    via := finding.other_column;
    hint := format('refers to column "%s" of %I', via, finding.target);
    if via is null and finding.has_right_key then
      is_true := false;
      if finding.is_right_type then
        execute format(
          'select exists (select from public."Transaction_History" as entry where entry.%1$I is not '
          'null and not exists (select from public.%2$I as target where target.%3$I = entry.%1$I))',
          finding.column_name, finding.target, finding.key
        ) into is_true;
      end if;

      -- The values may be those of another key of the table, if all of them occur there.
      for candidate in
        select attname, ambiguous.query
        from pg_attribute as attribute
        cross join lateral (
          select format(
            'select exists (select from public."Transaction_History" as entry inner join '
            'public.%1$I as target on target.%2$I = entry.%3$I%4$s) and (%5$L or not exists (select '
            'from public."Transaction_History" as entry where entry.%3$I is not null and not exists '
            '(select from public.%1$I as target where target.%2$I = entry.%3$I))) and not exists '
            '(select from public.%1$I where %2$I is not null group by %2$I having count(*) > 1)',
            finding.target, attribute.attname, finding.column_name,
            case when finding.is_right_type and not is_true then
              format(' where target.%I is distinct from entry.%I', finding.key, finding.column_name)
            end,
            not finding.is_right_type
          ) as query
        ) as ambiguous
        where attribute.attrelid = finding.target_oid and attribute.attnum > 0
          and not attribute.attisdropped and attribute.attname <> finding.key
          and (
            attribute.atttypid = finding.atttypid
            or array[attribute.atttypid, finding.atttypid]
            <@ array['int2'::regtype, 'int4'::regtype, 'int8'::regtype]::oid[]
          )
          and (
            attribute.attname = 'barcode_id'
            or exists (
              select from pg_index
              where indrelid = attribute.attrelid and indisunique and indnkeyatts = 1
                and indkey[0] = attribute.attnum
            )
          )
      loop
        execute candidate.query into has_candidate;
        if has_candidate then
          via := candidate.attname;
          exit;
        end if;
      end loop;
      hint := format('holds values of column "%s" of %I', via, finding.target);

      if finding.is_right_type and via is not null and not is_true then
        references_found := references_found || format(
          E'Column %1$I of "Transaction_History" has no foreign key, and its values occur in %2$I and '
          'in %3$I of %4$I. The fix is right for values of %2$I. For values of %3$I, run %5$s\n'
          'Fix: alter table public."Transaction_History" add foreign key (%1$I) references '
          'public.%4$I (%2$I);',
          finding.column_name, finding.key, via, finding.target,
          format(
            'update public."Transaction_History" as entry set %1$I = target.%2$I from public.%4$I '
            'as target where target.%3$I = entry.%1$I; before the fix.',
            finding.column_name, finding.key, via, finding.target
          )
        );
        continue;
      elsif is_true and via is null then
        references_found := references_found || format(
          E'Column %1$I of "Transaction_History" has values that are not in %2$I of %3$I. %4$s.\n'
          'Fix: %5$s', finding.column_name, finding.key, finding.target, finding.effect,
          finding.repair
        );
      end if;
    end if;
    if via is not null then
      mapped := mapped || finding.column_name::text;
      references_found := references_found || format(
        E'Column %1$I of "Transaction_History" %2$s, but the ledger needs %3$I. The fix looks up the '
        'new values, and keeps the old ones in the column %4$I.\nFix: %5$s',
        finding.column_name, hint, finding.key, 'old_' || finding.column_name,
        format(
          to_map, finding.target, via, finding.key, finding.type, 'new_' || finding.column_name,
          finding.column_name, 'old_' || finding.column_name
        )
      );
    end if;
  end loop;

  ------------------------------------------------------------------------------------------------
  -- Types of columns: smaller integers become bigint automatically, other types need a decision
  ------------------------------------------------------------------------------------------------

  for finding in
    select
      wanted.*, class.oid as table_oid, attribute.attnum, attribute.attgenerated,
      attribute.attidentity, attribute.atthasdef, attribute.atttypid,
      format_type(attribute.atttypid, attribute.atttypmod) as existing,
      wanted.column_name in ('card_id', 'id') as is_key,
      wanted.column_name in ('balance', 'price', 'amount_delta') as is_money,
      wanted.type = 'bigint'
      and attribute.atttypid in ('int2'::regtype, 'int4'::regtype) as becomes_longer
    from (values
      (1, 'Users', 'card_id', 'bigint', 'the card number of the user'),
      (2, 'Users', 'balance', 'bigint', 'money is whole minor units (öre)'),
      (3, 'Users', 'active', 'boolean', 'true or false'),
      (4, 'Items', 'id', 'uuid', 'the products service identifies items by UUID'),
      (5, 'Items', 'price', 'bigint', 'money is whole minor units (öre)'),
      (6, 'Items', 'active', 'boolean', 'true or false'),
      (7, 'Transaction_History', 'id', 'uuid', 'the transaction_id of a payment'),
      (8, 'Transaction_History', 'amount_delta', 'bigint', 'money is whole minor units (öre)'),
      (9, 'Transaction_History', 'created_at', 'timestamptz', 'a time with its time zone'),
      (10, 'Transaction_History', user_column, 'bigint', 'the card_id of the user'),
      (11, 'Transaction_History', 'item', 'uuid', 'the id of the item')
    ) as wanted (place, table_name, column_name, type, meaning)
    inner join pg_class as class on class.oid = to_regclass(format('public.%I', wanted.table_name))
    inner join pg_attribute as attribute
      on attribute.attrelid = class.oid and attribute.attname = wanted.column_name
    where not attribute.attisdropped
    order by wanted.place
  loop
    base_type := finding.atttypid;
    while (select typtype = 'd' from pg_type where oid = base_type) loop
      select typbasetype into base_type from pg_type where oid = base_type;
    end loop;
    select typcategory into category from pg_type where oid = base_type;

    if finding.attgenerated <> '' then
      conversions := conversions || format(
        E'Column %2$I of %1$I is generated, so it cannot be written.\nFix: %3$s',
        finding.table_name, finding.column_name,
        format(
          case finding.attgenerated
            when 's' then 'alter table public.%1$I alter column %2$I drop expression;'
            else
              'alter table public.%1$I add column new_%2$s %3$s; '
              'update public.%1$I set new_%2$s = %2$I; alter table public.%1$I drop column %2$I; '
              'alter table public.%1$I rename column new_%2$s to %2$I;'
          end,
          finding.table_name, finding.column_name, finding.existing
        )
      );
    end if;
    if finding.becomes_longer then
      altered_tables := altered_tables || finding.table_oid;
      altered_columns := altered_columns || finding.attnum::int;
    end if;
    continue when finding.becomes_longer or finding.atttypid = finding.type::regtype
      or finding.column_name = any(mapped);

    -- Try the conversion on the existing values.
    expression := format(
      case
        when base_type = finding.type::regtype then '%1$I::%2$s'
        when finding.is_money and base_type in ('int2'::regtype, 'int4'::regtype)
          then '%1$I::bigint'
        when finding.is_money and category = 'N' then 'round(%1$I::numeric * 100)::bigint'
        when finding.is_money then
          'round(replace(nullif(btrim(%1$I::text), ''''), '','', ''.'')::numeric * 100)::bigint'
        when finding.type = 'boolean' and category = 'N' then '%1$I::numeric <> 0'
        when finding.type = 'timestamptz' and category = 'D' then
          '%1$I::timestamp at time zone ''UTC'''
        when finding.type = 'timestamptz' and category = 'N' then
          'to_timestamp(%1$I::double precision / case when abs(%1$I) > 1e11 then 1000 else 1 end)'
        when finding.type = 'timestamptz' then
          'case when %1$I::text ~ '':\d\d.*([Zz]|[+-]\d\d(:?\d\d)?)$'' then %1$I::text::timestamptz '
          'else nullif(btrim(%1$I::text), '''')::timestamp at time zone ''UTC'' end'
        when finding.type = 'bigint' and category = 'N' then '%1$I::bigint'
        else 'nullif(btrim(%1$I::text), '''')::%2$s'
      end,
      finding.column_name, finding.type
    );
    conversion_error := null;
    begin
      execute format(
        'select count(distinct %1$s) = count(distinct %2$I::text) from public.%3$I',
        expression, finding.column_name, finding.table_name
      ) into is_true;
      if finding.is_key and not is_true then
        conversion_error := 'different values would become equal';
      end if;
    exception when data_exception or cannot_coerce then
      conversion_error := sqlerrm;
    end;

    -- Foreign keys that use the column; the migrations create those of the three tables again.
    select
      coalesce(string_agg(format(
        'alter table %s drop constraint if exists %I; ', conrelid::regclass, conname
      ), ''), ''),
      string_agg(distinct conrelid::regclass::text, ', ')
      filter (where conrelid not in (users, items, history))
    into foreign_keys, other_tables
    from pg_constraint
    where contype = 'f'
      and (
        (conrelid = finding.table_oid and finding.attnum = any(conkey))
        or (confrelid = finding.table_oid and finding.attnum = any(confkey))
      );

    fix := null;
    hint := '';
    if finding.is_key and (conversion_error is not null or category = 'N') then
      hint := format(
        ' The values cannot be kept (%s): the fix gives every row a new value, and keeps the old one in '
        'the column %I.',
        coalesce(conversion_error, 'a number is not a UUID'), 'old_' || finding.column_name
      );
      fix := format(
        'alter table public.%1$I rename column %2$I to old_%2$s; ',
        finding.table_name, finding.column_name
      );
      if other_tables is null then
        fix := fix || foreign_keys || coalesce((
          select string_agg(format(
            'alter table public.%I drop constraint %I; ', finding.table_name, conname
          ), '')
          from pg_constraint
          where conrelid = finding.table_oid and contype in ('p', 'u')
            and finding.attnum = any(conkey)
        ), '');
        if finding.attidentity = '' then
          fix := fix || format(
            'alter table public.%1$I alter column old_%2$s drop not null; ',
            finding.table_name, finding.column_name
          );
        end if;
      elsif not finding.atthasdef and finding.attidentity = '' then
        -- Foreign keys of other tables still use the old key, so new rows need a value for it.
        fix := fix || format(
          case
            when base_type in ('int2'::regtype, 'int4'::regtype, 'int8'::regtype) then
              'alter table public.%1$I alter column old_%2$s add generated by default as identity; '
              'select setval(pg_get_serial_sequence(''public.%1$I'', ''old_%2$s''), '
              'coalesce(max(old_%2$s), 0) + 1, false) from public.%1$I; '
            else
              'alter table public.%1$I alter column old_%2$s set default gen_random_uuid(); '
          end,
          finding.table_name, finding.column_name
        );
      end if;
      fix := fix || format(
        'alter table public.%I add column %I %s %s;',
        finding.table_name, finding.column_name,
        case finding.type
          when 'bigint' then 'bigint generated by default as identity'
          else 'uuid not null default gen_random_uuid()'
        end,
        case
          when exists (
            select from pg_constraint
            where conrelid = finding.table_oid and contype = 'p'
              and (other_tables is not null or not finding.attnum = any(conkey))
          ) then 'unique'
          else 'primary key'
        end
      );
      -- Entries refer to the new key instead of the old one.
      for candidate in
        select attname::text from pg_attribute
        where attrelid = history and not attisdropped
          and attname = case finding.table_name when 'Users' then user_column else 'item' end
          and finding.table_name <> 'Transaction_History'
          and (
            exists (
              select from pg_constraint
              where conrelid = history and contype = 'f' and confrelid = finding.table_oid
                and conkey = array[attnum] and confkey = array[finding.attnum]
            )
            or (atttypid = finding.atttypid and not attname = any(mapped))
          )
      loop
        mapped := mapped || candidate.attname;
        fix := fix || ' ' || format(
          to_map, finding.table_name, 'old_' || finding.column_name, finding.column_name,
          finding.type, 'new_' || candidate.attname, candidate.attname, 'old_' || candidate.attname
        );
      end loop;
    else
      hint := case
        when finding.is_money and base_type not in ('int2'::regtype, 'int4'::regtype, 'int8'::regtype)
          then ' The fix converts kronor to öre; remove "* 100" if the amounts are already in öre.'
        when finding.type = 'timestamptz' and category <> 'N' and base_type <> 'timestamptz'::regtype
          then ' The fix is for times in UTC; replace UTC if the times are of another time zone.'
        else ''
      end;
      if conversion_error is not null and finding.type = 'boolean' then
        execute format(
          'select string_agg(distinct quote_literal(lower(btrim(%1$I::text))), '', '') '
          'filter (where lower(btrim(%1$I::text)) in (''true'', ''t'', ''yes'', ''y'', ''on'', ''1'', '
          '''ja'', ''j'', ''active'', ''aktiv'', ''enabled'')) from public.%2$I',
          finding.column_name, finding.table_name
        ) into expression;
        expression := format(
          'lower(btrim(%I::text)) in (%s)', finding.column_name, coalesce(expression, '''true''')
        );
        hint := ' The fix lists the values that mean true; check and correct the list.';
        conversion_error := null;
      end if;
      if other_tables is not null then
        hint := hint || format(
          ' The fix drops foreign keys of %s: create them again after changing their columns.',
          other_tables
        );
      end if;
      if conversion_error is null then
        altered_tables := altered_tables || finding.table_oid;
        altered_columns := altered_columns || finding.attnum::int;
        fix := format(
          '%1$salter table public.%2$I alter column %3$I drop default, alter column %3$I '
          'drop identity if exists, alter column %3$I type %4$s using %5$s%6$s;',
          foreign_keys, finding.table_name, finding.column_name, finding.type, expression,
          case
            when finding.column_name = 'balance' then ', alter column balance set default 0'
            when finding.type = 'boolean' then ', alter column active set default true'
          end
        );
      elsif finding.column_name = 'item' then
        hint := format(
          ' Its values cannot be converted (%s), and do not occur in "Items". The fix keeps them in the '
          'column old_item; the entries then have no item.', conversion_error
        );
        fix := 'alter table public."Transaction_History" rename column item to old_item; '
        'alter table public."Transaction_History" alter column old_item drop not null; '
        'alter table public."Transaction_History" add column item uuid;';
      else
        hint := format(' Some values cannot be converted: %s.', conversion_error);
        fix := 'correct these values, and run the check again.';
      end if;
    end if;
    continue when finding.column_name = any(mapped);
    conversions := conversions || format(
      E'Column %2$I of %1$I has the type %3$s and should be %4$s: %5$s.%6$s\nFix: %7$s',
      finding.table_name, finding.column_name, finding.existing, finding.type, finding.meaning,
      hint, fix
    );
  end loop;

  ------------------------------------------------------------------------------------------------
  -- Objects that use a column whose type changes, or the old debit_use
  ------------------------------------------------------------------------------------------------

  -- The last object of a chain comes first, so that the statements work in this order.
  for finding in
    with recursive older (oid) as (
      select oid from pg_proc
      where pronamespace = 'public'::regnamespace and proname = 'debit_use'
        and (
          prorettype <> 'jsonb'::regtype
          or pg_get_function_identity_arguments(oid) not like 'user\_id\_input bigint, '
          'item\_input uuid, idempotency\_key\_input text, expected\_price\_input bigint%'
        )
    ),

    dependents (class, oid, reason, depth) as (
      select depend.classid, depend.objid, used.reason, 1
      from (
        select
          'pg_class'::regclass::oid as class, altered.table_oid as oid, altered.attnum,
          format(
            'uses column %I of %s, whose type has to change. Drop it, and create it again after the '
            'migration.', attribute.attname, altered.table_oid::regclass
          ) as reason
        from unnest(altered_tables, altered_columns) as altered (table_oid, attnum)
        inner join pg_attribute as attribute
          on altered.table_oid = attribute.attrelid and altered.attnum = attribute.attnum
        union all
        select
          'pg_proc'::regclass, older.oid, 0,
          'calls the old debit_use, which raised exceptions. The new one returns declines, which this '
          'caller would treat as success. Drop it, and create it again after the migration so that it '
          'reads "outcome".'
        from older
      ) as used
      inner join pg_depend as depend
        on used.class = depend.refclassid and used.oid = depend.refobjid
        and used.attnum = depend.refobjsubid
      where depend.deptype in ('n', 'a')
        and not exists ( -- the column's own default
          select from pg_attrdef
          where depend.classid = 'pg_attrdef'::regclass and pg_attrdef.oid = depend.objid
            and pg_attrdef.adrelid = used.oid and pg_attrdef.adnum = used.attnum
        )
      union
      select
        'pg_proc'::regclass, caller.oid,
        'calls the old debit_use, which raised exceptions. The new one returns declines, which this '
        'caller would treat as success. Drop it, and create it again after the migration so that it '
        'reads "outcome".', 1
      from pg_proc as caller
      where exists (select from older)
        and caller.proname not in ('debit_use', 'debit_use_batch', 'find_payment')
        and caller.prokind in ('f', 'p')
        and coalesce(pg_get_function_sqlbody(caller.oid), caller.prosrc) ~ 'debit_use'
      union
      select depend.classid, depend.objid, dependents.reason, dependents.depth + 1
      from dependents
      left join pg_rewrite as rule
        on dependents.class = 'pg_rewrite'::regclass and dependents.oid = rule.oid
        and rule.rulename = '_RETURN'
      inner join pg_depend as depend
        on depend.refclassid = case when rule.oid is null then dependents.class else 'pg_class'::regclass end
        and depend.refobjid = coalesce(rule.ev_class, dependents.oid)
        and depend.objid <> dependents.oid and depend.deptype in ('n', 'a')
    )

    select object.name, object.statement, min(dependents.reason) as reason
    from dependents
    left join pg_rewrite as rule
      on dependents.class = 'pg_rewrite'::regclass and dependents.oid = rule.oid
    left join pg_class as relation on rule.ev_class = relation.oid
    left join pg_policy as policy
      on dependents.class = 'pg_policy'::regclass and dependents.oid = policy.oid
    left join pg_trigger as trigger
      on dependents.class = 'pg_trigger'::regclass and dependents.oid = trigger.oid
    left join pg_publication_rel as published
      on dependents.class = 'pg_publication_rel'::regclass and dependents.oid = published.oid
    left join pg_publication as publication on published.prpubid = publication.oid
    left join pg_attrdef as standard
      on dependents.class = 'pg_attrdef'::regclass and dependents.oid = standard.oid
    left join pg_attribute as attribute
      on standard.adrelid = attribute.attrelid and standard.adnum = attribute.attnum
    cross join lateral (
      select
        case
          when rule.rulename = '_RETURN' then pg_describe_object('pg_class'::regclass, relation.oid, 0)
          when attribute.attname is not null then
            format('column %I of %s', attribute.attname, attribute.attrelid::regclass)
          else pg_describe_object(dependents.class, dependents.oid, 0)
        end as name,
        case
          when rule.rulename = '_RETURN' and relation.relkind = 'm'
            then format('drop materialized view %s;', relation.oid::regclass)
          when rule.rulename = '_RETURN' then format('drop view %s;', relation.oid::regclass)
          when rule.oid is not null
            then format('drop rule if exists %I on %s;', rule.rulename, relation.oid::regclass)
          when dependents.class = 'pg_proc'::regclass
            then format('drop routine %s;', dependents.oid::regprocedure)
          when policy.oid is not null
            then format('drop policy %I on %s;', policy.polname, policy.polrelid::regclass)
          when trigger.oid is not null then format(
            'drop trigger if exists %I on %s;', trigger.tgname, trigger.tgrelid::regclass
          )
          when published.oid is not null then format(
            'alter publication %I drop table %s;', publication.pubname, published.prrelid::regclass
          )
          when attribute.attgenerated <> '' then format(
            'alter table %s drop column %I;', attribute.attrelid::regclass, attribute.attname
          )
          when standard.oid is not null then format(
            'alter table %s alter column %I drop default;',
            attribute.attrelid::regclass, attribute.attname
          )
        end as statement
    ) as object
    where object.statement is not null
    group by object.name, object.statement
    order by max(dependents.depth) desc, object.statement
  loop
    obstacles := obstacles || format(
      E'%s %s\nFix: %s', upper(left(finding.name, 1)) || substr(finding.name, 2), finding.reason,
      finding.statement
    );
  end loop;

  -- If a column has the row type of a table, the columns of that table cannot be changed.
  for finding in
    with recursive types (oid, table_oid) as (
      select class.reltype, class.oid from pg_class as class where class.oid = any(altered_tables)
      union
      select type.oid, types.table_oid
      from types
      inner join pg_type as type
        on types.oid in (type.typelem, type.typbasetype)
        or exists (
          select from pg_attribute as part
          inner join pg_class as composite on part.attrelid = composite.oid
          where composite.relkind = 'c' and composite.reltype = type.oid and part.atttypid = types.oid
        )
    )

    select attribute.attname, class.oid::regclass as name, types.table_oid::regclass as row_type
    from types
    inner join pg_attribute as attribute on types.oid = attribute.atttypid
    inner join pg_class as class on attribute.attrelid = class.oid and class.relkind in ('r', 'p')
    where not attribute.attisdropped
  loop
    obstacles := obstacles || format(
      E'Column %1$I of %2$s contains rows of %3$s, but the type of a column of %3$s has to change. The '
      'fix converts them to jsonb.\n'
      'Fix: alter table %2$s alter column %1$I type jsonb using to_jsonb(%1$I);',
      finding.attname, finding.name, finding.row_type
    );
  end loop;

  ------------------------------------------------------------------------------------------------
  -- Missing values, keys, and values that the ledger cannot store
  ------------------------------------------------------------------------------------------------

  for finding in
    select wanted.* from (values
      (
        'Users', 'card_id', 'bigint', 'a user needs a card number. The fix gives each of them the '
        'next free number',
        'update public."Users" as users set card_id = numbered.number from (select ctid, (select '
        'coalesce(max(card_id), 0) from public."Users") + row_number() over (order by ctid) as number '
        'from public."Users" where card_id is null) as numbered where users.ctid = numbered.ctid;'
      ),
      (
        'Users', 'balance', null,
        'a user needs a balance. The fix sets the balance of the last entry, or 0',
        case
          when is_migrated then
            'update public."Users" set balance = coalesce((select balance_after from '
            'public."Transaction_History" where user_id = card_id order by seq desc limit 1), 0) '
            'where balance is null;'
          else 'update public."Users" set balance = 0 where balance is null;'
        end
      ),
      (
        'Users', 'active', null,
        'it says whether the user may pay. The fix deactivates these users',
        'update public."Users" set active = false where active is null;'
      ),
      (
        'Items', 'id', 'uuid', 'an item needs an id. The fix generates ids',
        'update public."Items" set id = gen_random_uuid() where id is null;'
      ),
      (
        'Items', 'price', null,
        'an item needs a price. The fix sets 0 and deactivates these items',
        'update public."Items" set price = 0, active = false where price is null;'
      ),
      (
        'Items', 'active', null,
        'it says whether the item is for sale. The fix deactivates these items',
        'update public."Items" set active = false where active is null;'
      ),
      (
        'Transaction_History', 'id', 'uuid', 'an entry needs an id. The fix generates ids',
        'update public."Transaction_History" set id = gen_random_uuid() where id is null;'
      ),
      (
        'Transaction_History', user_column, null,
        'an entry belongs to a user. The fix moves such entries to another schema', to_archive
      ),
      (
        'Transaction_History', 'created_at', null,
        'an entry needs a time. The fix sets the year 2000',
        'update public."Transaction_History" set created_at = ''2000-01-01Z'' '
        'where created_at is null;'
      )
    ) as wanted (table_name, column_name, type, reason, repair)
    inner join pg_attribute as attribute
      on attribute.attrelid = to_regclass(format('public.%I', wanted.table_name))
      and attribute.attname = wanted.column_name
    -- There may be a not-null constraint that was never validated.
    where not attribute.attisdropped and not (is_migrated and attribute.attnotnull)
      and (wanted.type is null or wanted.type = format_type(attribute.atttypid, null)
        or (wanted.type = 'bigint' and attribute.atttypid in ('int2'::regtype, 'int4'::regtype)))
  loop
    execute format(
      'select exists (select from public.%I where %I is null)',
      finding.table_name, finding.column_name
    ) into is_true;
    if is_true then
      conversions := conversions || format(
        E'Column %2$I of %1$I is null in some rows: %3$s.\nFix: %4$s',
        finding.table_name, finding.column_name, finding.reason, finding.repair
      );
    end if;
  end loop;

  for finding in
    select
      wanted.*,
      case
        when exists (select from pg_constraint where conrelid = attribute.attrelid and contype = 'p')
          then 'unique'
        else 'primary key'
      end as kind
    from (values
      ('Users', 'card_id', '(select coalesce(max(card_id), 0) from public."Users") + '
        'row_number() over (order by ctid)'),
      ('Items', 'id', 'gen_random_uuid()'),
      ('Transaction_History', 'id', 'gen_random_uuid()')
    ) as wanted (table_name, column_name, next_value)
    inner join pg_attribute as attribute
      on attribute.attrelid = to_regclass(format('public.%I', wanted.table_name))
      and attribute.attname = wanted.column_name and not attribute.attisdropped
    -- The key of a partitioned or distributed history includes the user.
    where not exists (
      select from pg_index
      where indrelid = attribute.attrelid and indisunique and indisvalid and indimmediate
        and indpred is null
        and (
          (indnkeyatts = 1 and indkey[0] = attribute.attnum)
          or (wanted.table_name = 'Transaction_History' and is_migrated)
        )
    )
  loop
    execute format(
      'select exists (select from public.%1$I where %2$I is not null group by %2$I having count(*) > 1)',
      finding.table_name, finding.column_name
    ) into is_true;
    conversions := conversions || format(
      E'Column %2$I of %1$I is not unique.%3$s\nFix: %4$salter table public.%1$I add %5$s (%2$I);',
      finding.table_name, finding.column_name,
      case when is_true then
        ' Some rows have the same value: the fix gives a new value to all of them except the first.'
      end,
      case when is_true then format(
        'update public.%1$I as target set %2$I = numbered.next from (select ctid, %3$s as next from '
        '(select ctid, row_number() over (partition by %2$I order by ctid) as place from '
        'public.%1$I) as duplicates where place > 1) as numbered where target.ctid = numbered.ctid; ',
        finding.table_name, finding.column_name, finding.next_value
      ) end,
      finding.kind
    );
  end loop;

  -- A table that is published for updates, as for Realtime, needs a key that identifies its rows.
  for finding in
    select
      class.relname, wanted.column_name, publication.pubname,
      exists (select from pg_index where indrelid = class.oid and indisprimary) as has_primary_key
    from (values
      (users, 'card_id'), (items, 'id'), (history, 'id')
    ) as wanted (table_oid, column_name)
    inner join pg_class as class on wanted.table_oid = class.oid
    inner join lateral (
      select min(pg_publication.pubname) as pubname
      from pg_publication_tables
      inner join pg_publication on pg_publication_tables.pubname = pg_publication.pubname
      where schemaname = 'public' and tablename = class.relname and (pubupdate or pubdelete)
    ) as publication on publication.pubname is not null
    where case class.relreplident
      when 'n' then true
      when 'd' then not exists (select from pg_index where indrelid = class.oid and indisprimary)
      when 'i' then not exists (select from pg_index where indrelid = class.oid and indisreplident)
      else false
    end
    and exists (
      select from pg_index
      inner join pg_attribute on indrelid = attrelid and indkey[0] = attnum
      where indrelid = class.oid and indisunique and indnkeyatts = 1 and indpred is null
        and attname = wanted.column_name
    )
  loop
    conversions := conversions || format(
      E'Table %1$I is published by %2$I without a primary key as its replica identity, so its rows '
      'cannot be updated.\nFix: %3$salter table public.%1$I replica identity default;',
      finding.relname, finding.pubname,
      case when not finding.has_primary_key then format(
        'alter table public.%I add primary key (%I); ', finding.relname, finding.column_name
      ) end
    );
  end loop;

  conversions := conversions || references_found;

  if exists (
    select from pg_attribute
    where attrelid = items and attname = 'price' and not attisdropped
      and format_type(atttypid, null) in ('smallint', 'integer', 'bigint')
  ) then
    execute 'select exists (select from public."Items" where price < 0)' into is_true;
    if is_true then
      conversions := conversions || E'Some items have a price below zero, which would pay the buyer.\n'
        'Fix: update public."Items" set price = 0, active = false where price < 0;'::text;
    end if;
  end if;

  if not is_migrated and exists (
    select from pg_attribute
    where attrelid = history and attname = 'created_at' and not attisdropped
      and atttypid = 'timestamptz'::regtype
  ) then
    execute 'select exists (select from public."Transaction_History" where created_at = ''-infinity'' '
    'or created_at > now() + interval ''1 day'')' into is_true;
    if is_true then
      conversions := conversions || E'Some entries have a time in the future, or an infinite time, and '
      'later entries of the user would get the same time. The fix sets the current time, or the year '
      '2000 instead of -infinity; use better times if you know them.\n'
      'Fix: update public."Transaction_History" set created_at = now() where created_at > now() + '
      'interval ''1 day''; update public."Transaction_History" set created_at = ''2000-01-01Z'' '
      'where created_at = ''-infinity'';'::text;
    end if;
  end if;

  -- The opening entry is the balance less the sum of the entries.
  if not is_migrated and 3 = (
    select count(*) from pg_attribute
    where attrelid in (users, history) and not attisdropped
      and atttypid in ('int2'::regtype, 'int4'::regtype, 'int8'::regtype)
      and attname in ('balance', 'amount_delta', user_column)
  ) and exists (
    select from pg_attribute
    where attrelid = users and attname = 'card_id' and not attisdropped
      and atttypid in ('int2'::regtype, 'int4'::regtype, 'int8'::regtype)
  ) then
    execute format(
      'select exists (select from public."Users" as users left join '
      'public."Transaction_History" as entry on entry.%I = users.card_id '
      'group by users.card_id, users.balance having abs(users.balance::numeric) + '
      'coalesce(sum(abs(entry.amount_delta::numeric)), 0) > 9223372036854775807)', user_column
    ) into is_true;
    if is_true then
      conversions := conversions || E'The balance and entries of a user exceed the range of bigint. The '
      'fix limits amounts to 10^13 kronor; use the right amounts if you know them.\n'
      'Fix: update public."Users" set balance = 1000000000000000 where balance > 1000000000000000; '
      'update public."Transaction_History" set amount_delta = case when amount_delta < 0 then '
      '-1000000000000000 else 1000000000000000 end where amount_delta not between '
      '-1000000000000000 and 1000000000000000;'::text;
    end if;
  end if;
  end readable_tables;

  obstacles := obstacles || conversions;
  if cardinality(obstacles) > 0 then
    raise exception using
      errcode = 'object_not_in_prerequisite_state',
      message = format(
        'This database cannot be migrated yet, and nothing was changed. Remove %s first:%s',
        case cardinality(obstacles) when 1 then '1 obstacle' else cardinality(obstacles) || ' obstacles' end,
        (
          select string_agg(E'\n\n' || place || '. ' || obstacle, '' order by place)
          from unnest(obstacles) with ordinality as listed (obstacle, place)
        )
      );
  end if;
end
$check$;

-- The other files raise an exception if this schema does not exist.
create schema if not exists ledger;
comment on schema ledger is
'Functions of the ledger, and stored declines; the API does not expose this schema.';

commit;
