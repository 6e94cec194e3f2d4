-- The history becomes a ledger: each entry has its number and the balance after it.
-- One transaction adds the columns, numbers the existing entries and creates the triggers, so that
-- no entry and no balance is ever written without the triggers. They apply to every writer:
--
--   An entry must continue the user's last entry: seq is one higher, balance_after is higher by
--   amount_delta, and created_at is not earlier.
--   If a balance changes without an entry, an entry is written: opening for a new user, otherwise
--   adjustment.
--   No write makes a balance negative. An old negative balance may only rise.
--   Entries and stored declines cannot be changed or removed. The exception is declines with
--   generated keys: they may be removed after a day.

begin;

set local statement_timeout = 0;

do $$
begin
  if obj_description(to_regnamespace('ledger'), 'pg_namespace') is null
    or to_regclass('ledger.declines') is null then
    raise exception using
      errcode = 'object_not_in_prerequisite_state',
      message = 'The migration before this one was not applied. Apply the files in order, and read the '
      'message of the first file that fails.';
  end if;
end
$$;

-- Lock all three at once: writers that lock them in another order would cause a deadlock. Waiting
-- between attempts lets them finish.
do $$
begin
  perform set_config('lock_timeout', '300ms', true);
  for attempt in 1..60 loop
    begin
      lock table public."Items", public."Users", public."Transaction_History"
      in access exclusive mode;
      perform set_config('lock_timeout', '10s', true);
      return;
    exception when lock_not_available then
      perform pg_sleep(0.1 + random() * 0.3);
    end;
  end loop;
  raise exception using
    errcode = 'lock_not_available',
    message = 'The tables are in use, and this file changed nothing. Stop the programs that write to '
    'them, or apply this file again later. pg_stat_activity shows the sessions that use them.';
end
$$;

-- Deferred checks and triggers would be pending when a table is altered.
set constraints all immediate;

drop trigger if exists verify_entry on public."Transaction_History";
drop trigger if exists refuse_change on public."Transaction_History";
drop trigger if exists refuse_truncate on public."Transaction_History";

-- Version 0.1 numbered the entries of all users with one sequence, and its triggers chained them.
do $$
begin
  if exists (
    select from pg_trigger
    where tgrelid = 'public."Transaction_History"'::regclass and tgname = 'chain_entry'
  ) then
    drop trigger chain_entry on public."Transaction_History";
    drop trigger apply_entry on public."Transaction_History";
    alter table public."Transaction_History" alter column seq drop identity if exists;
    drop index public.transaction_history_user_id_seq_idx;
    update public."Transaction_History" as entry
    set seq = numbered.seq
    from (
      select id, row_number() over (partition by user_id order by seq) as seq
      from public."Transaction_History"
    ) as numbered
    where entry.id = numbered.id;
    drop function ledger.chain_entry();
    drop function ledger.apply_entry();
    -- The debit_use of version 0.1 writes entries that the triggers now reject. Until the next
    -- migration replaces it, it raises an error after which callers retry.
    execute $function$
      create or replace function ledger.debit(
        user_id_input bigint,
        item_input uuid,
        idempotency_key_input text,
        expected_price_input bigint
      ) returns jsonb
      language plpgsql
      as 'begin
        raise exception ''the ledger is being upgraded'' using errcode = ''lock_not_available'';
      end'
    $function$;
  end if;
end
$$;

-- A row without an amount counts as zero, because its price is not known.
alter table public."Transaction_History"
add column if not exists amount_delta bigint default 0,
add column if not exists seq bigint,
add column if not exists kind text,
add column if not exists balance_after bigint,
add column if not exists idempotency_key text,
add column if not exists expected_price bigint,
add column if not exists actor text,
alter column item drop not null,
alter column id set default gen_random_uuid(),
alter column created_at set default now();

do $$
declare
  others text[];
  states text[];
begin
  -- Only the first time, when the entries have no numbers yet. If a balance differs from its entries
  -- later, that is an error, which the audit reports.
  if exists (
    select from pg_attribute
    where attrelid = 'public."Transaction_History"'::regclass and attname = 'seq' and attnotnull
  ) then
    return;
  end if;

  -- Disable webhooks and similar triggers: they should report new entries, but not old ones.
  select array_agg(tgname), array_agg(case tgenabled when 'A' then 'enable always' else 'enable' end)
  into others, states
  from pg_trigger
  where tgrelid = 'public."Transaction_History"'::regclass and not tgisinternal
    and tgenabled in ('O', 'A');
  alter table public."Transaction_History" disable trigger user;

  update public."Transaction_History" set amount_delta = 0 where amount_delta is null;

  -- The amount of an opening entry is the balance minus the sum of the user's existing rows.
  insert into public."Transaction_History" (user_id, amount_delta, kind, created_at)
  select
    users.card_id,
    users.balance - coalesce(sum(entry.amount_delta), 0),
    'opening',
    coalesce(min(entry.created_at), now())
  from public."Users" as users
  left join public."Transaction_History" as entry on users.card_id = entry.user_id
  group by users.card_id, users.balance
  having users.balance <> coalesce(sum(entry.amount_delta), 0);

  update public."Transaction_History" as entry
  set
    seq = numbered.seq,
    balance_after = numbered.balance_after,
    kind = case
      when entry.kind = 'opening' then 'opening'
      when entry.amount_delta <= 0 and entry.item is not null then 'debit'
      else 'adjustment'
    end
  from (
    select
      id,
      row_number() over user_entries as seq,
      sum(amount_delta) over user_entries as balance_after
    from public."Transaction_History"
    window user_entries as (
      partition by user_id
      order by coalesce(kind = 'opening', false) desc, created_at, id
    )
  ) as numbered
  where entry.id = numbered.id;

  for place in 1..coalesce(cardinality(others), 0) loop
    execute format(
      'alter table public."Transaction_History" %s trigger %I', states[place], others[place]
    );
  end loop;
end
$$;

alter table public."Transaction_History"
alter column id set not null,
alter column user_id set not null,
alter column amount_delta set not null,
alter column amount_delta drop default,
alter column created_at set not null,
alter column seq set not null,
alter column kind set not null,
alter column kind drop default,
alter column balance_after set not null;

alter table public."Transaction_History"
drop constraint if exists transaction_history_kind_known;
alter table public."Transaction_History"
add constraint transaction_history_kind_known
check (kind = any('{opening,debit,refund,credit,payout,reversal,adjustment}'));

alter table public."Transaction_History"
drop constraint if exists transaction_history_debit_takes_for_an_item;
alter table public."Transaction_History"
add constraint transaction_history_debit_takes_for_an_item
check (kind <> 'debit' or (amount_delta <= 0 and item is not null));

alter table public."Transaction_History"
drop constraint if exists transaction_history_idempotency_key_length;
alter table public."Transaction_History"
add constraint transaction_history_idempotency_key_length
check (char_length(idempotency_key) between 1 and 255);

-- Add missing foreign keys. They have no explicit names, because a foreign key of another column
-- may have the usual name.
do $$
declare
  missing record;
begin
  for missing in
    select wanted.column_name, wanted.target, wanted.key
    from (values
      ('user_id', 'public."Users"'::regclass, 'card_id'),
      ('item', 'public."Items"'::regclass, 'id')
    ) as wanted (column_name, target, key)
    where not exists (
      select from pg_constraint
      cross join unnest(conkey, confkey) as pair (own_number, target_number)
      inner join pg_attribute as own
        on pg_constraint.conrelid = own.attrelid and pair.own_number = own.attnum
      inner join pg_attribute as target
        on pg_constraint.confrelid = target.attrelid and pair.target_number = target.attnum
      where pg_constraint.conrelid = 'public."Transaction_History"'::regclass
        and pg_constraint.contype = 'f'
        and pg_constraint.confrelid = wanted.target
        and own.attname = wanted.column_name and target.attname = wanted.key
    )
  loop
    execute format(
      'alter table public."Transaction_History" add foreign key (%I) references %s (%I)',
      missing.column_name, missing.target, missing.key
    );
  end loop;
end
$$;

create unique index if not exists transaction_history_user_id_seq_idx
on public."Transaction_History" (user_id, seq);

create unique index if not exists transaction_history_user_id_idempotency_key_idx
on public."Transaction_History" (user_id, idempotency_key)
where idempotency_key is not null;

-- Reject an entry that does not continue the user's last one.
create or replace function ledger.verify_entry() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  continues boolean;
begin
  select
    new.seq = last_entry.seq + 1
    and new.balance_after = last_entry.balance_after + new.amount_delta
    and new.created_at >= last_entry.created_at
  into continues
  from public."Transaction_History" as last_entry
  where last_entry.user_id = new.user_id
  order by last_entry.seq desc
  limit 1;
  if not found then
    continues := new.seq = 1 and new.balance_after = new.amount_delta;
  end if;

  if continues is not true then
    raise exception using
      errcode = 'check_violation',
      message = 'entries of "Transaction_History" are written by functions only: call '
      'public.debit_use to charge a user; to top up, update "Users".balance, which writes the entry',
      schema = tg_table_schema,
      table = tg_table_name,
      constraint = 'transaction_history_continues_last_entry';
  end if;
  return new;
end
$$;

-- Write an entry if another writer changed the balance. If the balance equals balance_after of the
-- last entry, do nothing.
create or replace function ledger.explain_balance() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  last_entry record;
  entry_kind text := 'adjustment';
begin
  -- One query handles the usual cases: the balance is unchanged (or null), or a function has already
  -- written the entry. The trigger has no "when" clause, because PostgreSQL would parse it for each
  -- statement (8 of 150 µs).
  if coalesce(new.balance = old.balance, tg_op = 'UPDATE') or new.balance = (
    select balance_after from public."Transaction_History"
    where user_id = new.card_id and new.balance >= 0
    order by seq desc
    limit 1
  ) then
    return null;
  end if;
  if new.balance < 0 and (tg_op = 'INSERT' or new.balance < old.balance) then
    raise exception 'the balance of user % would fall below zero', new.card_id
    using
      errcode = 'check_violation',
      schema = 'public',
      table = 'Users',
      constraint = 'users_balance_not_negative';
  end if;

  select seq, balance_after, created_at into last_entry from public."Transaction_History"
  where user_id = new.card_id
  order by seq desc
  limit 1;
  if new.balance = coalesce(last_entry.balance_after, 0) then
    return null;
  end if;
  if tg_op = 'INSERT' then
    entry_kind := 'opening';
  end if;
  insert into public."Transaction_History" (
    user_id, seq, kind, amount_delta, balance_after, created_at, actor
  ) values (
    new.card_id,
    coalesce(last_entry.seq, 0) + 1,
    entry_kind,
    new.balance - coalesce(last_entry.balance_after, 0),
    new.balance,
    greatest(clock_timestamp(), last_entry.created_at),
    'database:' || coalesce(nullif(current_setting('role'), 'none'), session_user)
  );
  return null;
end
$$;

create or replace function ledger.refuse_change() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  raise exception 'entries of % cannot be changed or removed; write another entry', tg_table_name
  using
    errcode = 'restrict_violation',
    schema = tg_table_schema,
    table = tg_table_name,
    constraint = 'ledger_is_append_only';
end
$$;

create trigger verify_entry
before insert on public."Transaction_History"
for each row execute function ledger.verify_entry();

create or replace trigger explain_first_balance
after insert on public."Users"
for each row when (new.balance <> 0) execute function ledger.explain_balance();

create or replace trigger explain_balance
after update on public."Users"
for each row execute function ledger.explain_balance();

create trigger refuse_change
before update or delete on public."Transaction_History"
for each statement execute function ledger.refuse_change();

create trigger refuse_truncate
before truncate on public."Transaction_History"
for each statement execute function ledger.refuse_change();

create or replace trigger refuse_change
before update on ledger.declines
for each statement execute function ledger.refuse_change();

-- Only a call in flight uses a key that the service generated, so the decline can be removed later.
create or replace trigger refuse_removal
before delete on ledger.declines
for each row when (
  (old.idempotency_key = old.attempt::text and old.created_at < now() - interval '1 day')
  is not true
) execute function ledger.refuse_change();

create or replace trigger refuse_truncate
before truncate on ledger.declines
for each statement execute function ledger.refuse_change();

alter table public."Transaction_History" enable row level security;

revoke all on public."Transaction_History"
from public, anon, authenticated, service_role cascade;
grant select on public."Transaction_History" to service_role;

revoke all on function
ledger.verify_entry(), ledger.explain_balance(), ledger.refuse_change()
from public, anon, authenticated, service_role;

commit;
