-- The history becomes a ledger: every entry says what it did to the balance and in which order.
-- A history that was kept by hand is brought along; an opening entry carries what its rows leave
-- unexplained of a balance. A row without an amount says what was bought, not for how much: zero.

do $$
begin
  if exists (
    select from information_schema.columns
    where table_schema = 'public' and table_name = 'Transaction_History' and column_name = 'user'
  ) then
    alter table public."Transaction_History" rename column "user" to user_id;
  end if;
end
$$;

alter table public."Transaction_History"
add column if not exists amount_delta bigint not null default 0,
add column if not exists seq bigint,
add column if not exists kind text,
add column if not exists balance_after bigint,
add column if not exists idempotency_key text,
add column if not exists expected_price bigint,
alter column item drop not null;

alter table public."Transaction_History" alter column amount_delta drop default;

do $$
begin
  lock table public."Users", public."Transaction_History" in share row exclusive mode;

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

  if exists (select from public."Transaction_History" where seq is null) then
    with numbered as (
      select
        id,
        row_number() over (order by kind = 'opening' desc nulls last, created_at, id) as seq
      from public."Transaction_History"
    )

    update public."Transaction_History" as entry
    set
      seq = numbered.seq,
      kind = coalesce(
        entry.kind,
        case when entry.amount_delta <= 0 and entry.item is not null then 'debit' end,
        'adjustment'
      )
    from numbered
    where entry.id = numbered.id;

    with chained as (
      select id, sum(amount_delta) over (partition by user_id order by seq) as balance_after
      from public."Transaction_History"
    )

    update public."Transaction_History" as entry
    set balance_after = chained.balance_after
    from chained
    where entry.id = chained.id;
  end if;

  if exists (
    select from pg_attribute
    where attrelid = 'public."Transaction_History"'::regclass
      and attname = 'seq' and attidentity = ''
  ) then
    alter table public."Transaction_History" alter column seq set not null;
    alter table public."Transaction_History" alter column seq add generated always as identity;
    perform setval(
      pg_get_serial_sequence('public."Transaction_History"', 'seq'),
      (select coalesce(max(seq), 0) + 1 from public."Transaction_History"),
      false
    );
  end if;
end
$$;

alter table public."Transaction_History"
alter column kind set default 'adjustment',
alter column kind set not null,
alter column balance_after set not null,
drop constraint if exists transaction_history_kind_known,
drop constraint if exists transaction_history_debit_takes_for_an_item,
drop constraint if exists transaction_history_idempotency_key_length;

alter table public."Transaction_History"
add constraint transaction_history_kind_known
check (kind in ('opening', 'debit', 'adjustment', 'refund', 'credit')),
add constraint transaction_history_debit_takes_for_an_item
check (kind <> 'debit' or (amount_delta <= 0 and item is not null)),
add constraint transaction_history_idempotency_key_length
check (char_length(idempotency_key) between 1 and 255);

create unique index if not exists transaction_history_user_id_seq_idx
on public."Transaction_History" (user_id, seq);

create unique index if not exists transaction_history_user_id_idempotency_key_idx
on public."Transaction_History" (user_id, idempotency_key)
where idempotency_key is not null;

revoke all on sequence public."Transaction_History_seq_seq"
from public, anon, authenticated, service_role;
grant usage on sequence public."Transaction_History_seq_seq" to service_role;
