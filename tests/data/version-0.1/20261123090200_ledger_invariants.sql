-- What the ledger holds by itself, whoever writes:
--   an entry's balance_after is that of the user's entry before it plus its own amount_delta;
--   a user's balance is the balance_after of the last entry;
--   no write takes a balance below zero; one that is negative from older days may only rise;
--   entries, and remembered declines, are never changed and never go away.

-- The user's row is locked before the number is drawn, so that the numbers of one user's entries
-- are in the order in which they were committed, also when an entry is inserted by hand.
create or replace function ledger.chain_entry() returns trigger
language plpgsql
set search_path = ''
as $$
begin
  perform from public."Users" where card_id = new.user_id for no key update;
  new.seq := nextval('public."Transaction_History_seq_seq"');
  new.balance_after := new.amount_delta + coalesce(
    (
      select entry.balance_after from public."Transaction_History" as entry
      where entry.user_id = new.user_id
      order by entry.seq desc
      limit 1
    ),
    0
  );
  return new;
end
$$;

-- Of several entries in one statement only the last speaks for the balance.
create or replace function ledger.apply_entry() returns trigger
language plpgsql
set search_path = ''
as $$
begin
  update public."Users"
  set balance = new.balance_after
  where card_id = new.user_id
    and balance <> new.balance_after
    and not exists (
      select from public."Transaction_History" as entry
      where entry.user_id = new.user_id and entry.seq > new.seq
    );
  return null;
end
$$;

-- A balance that the last entry does not explain was written by somebody else: it gets an entry.
create or replace function ledger.explain_balance() returns trigger
language plpgsql
set search_path = ''
as $$
declare
  explained bigint := coalesce(
    (
      select entry.balance_after from public."Transaction_History" as entry
      where entry.user_id = new.card_id
      order by entry.seq desc
      limit 1
    ),
    0
  );
begin
  if new.balance < 0 and (tg_op = 'INSERT' or new.balance < old.balance) then
    raise exception 'the balance of user % would fall below zero', new.card_id
    using
      errcode = 'check_violation',
      schema = 'public',
      table = 'Users',
      constraint = 'users_balance_not_negative';
  end if;
  if new.balance <> explained then
    insert into public."Transaction_History" (user_id, amount_delta, balance_after, kind)
    values (
      new.card_id, new.balance - explained, new.balance,
      case tg_op when 'INSERT' then 'opening' else 'adjustment' end
    );
  end if;
  return null;
end
$$;

create or replace function ledger.refuse_change() returns trigger
language plpgsql
set search_path = ''
as $$
begin
  raise exception 'entries of % are never changed or removed; write another entry', tg_table_name
  using
    errcode = 'restrict_violation',
    schema = tg_table_schema,
    table = tg_table_name,
    constraint = 'ledger_is_append_only';
end
$$;

create or replace trigger chain_entry
before insert on public."Transaction_History"
for each row execute function ledger.chain_entry();

create or replace trigger apply_entry
after insert on public."Transaction_History"
for each row execute function ledger.apply_entry();

create or replace trigger explain_first_balance
after insert on public."Users"
for each row when (new.balance <> 0) execute function ledger.explain_balance();

create or replace trigger explain_balance
after update on public."Users"
for each row when (old.balance <> new.balance) execute function ledger.explain_balance();

create or replace trigger refuse_change
before update or delete or truncate on public."Transaction_History"
for each statement execute function ledger.refuse_change();

create or replace trigger refuse_change
before update or delete or truncate on ledger.declines
for each statement execute function ledger.refuse_change();

create or replace function public.audit_ledger()
returns table (user_id bigint, fault text)
language sql stable security invoker
set search_path = ''
set statement_timeout = '10min'
as $$
  with chain as (
    select
      entry.user_id,
      entry.balance_after,
      entry.balance_after - entry.amount_delta as balance_before,
      lag(entry.balance_after, 1, 0::bigint) over (
        partition by entry.user_id order by entry.seq
      ) as balance_after_previous,
      lead(entry.seq) over (partition by entry.user_id order by entry.seq) is null as is_last
    from public."Transaction_History" as entry
  )

  select chain.user_id, 'an entry does not follow from the one before it' as fault
  from chain
  group by chain.user_id
  having bool_or(chain.balance_before <> chain.balance_after_previous)
  union all
  select users.card_id, 'the balance is not that of the last entry' as fault
  from public."Users" as users
  left join chain on users.card_id = chain.user_id and chain.is_last
  where users.balance <> coalesce(chain.balance_after, 0)
$$;

comment on function public.audit_ledger is
'Every user whose entries or balance do not add up, and what is wrong; none, if all is well.';

revoke all on function
ledger.chain_entry(), ledger.apply_entry(), ledger.explain_balance(), ledger.refuse_change(),
public.audit_ledger()
from public, anon, authenticated, service_role;
grant execute on function public.audit_ledger() to service_role;
