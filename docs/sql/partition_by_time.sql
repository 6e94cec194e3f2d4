-- Partition the ledger by time. See "A partitioned ledger" in docs/scaling.md before you run this.
-- Debits wait, or get ledger_unavailable, until it ends. psql -v ON_ERROR_STOP=1 -f FILE

begin;
set local lock_timeout = '5s';
set local statement_timeout = 0;
lock table public."Users", public."Transaction_History" in access exclusive mode;

-- Keys stay unique over all partitions.
create table ledger.keys (
  user_id bigint not null,
  idempotency_key text not null,
  constraint keys_pkey primary key (user_id, idempotency_key)
);
insert into ledger.keys (user_id, idempotency_key)
select user_id, idempotency_key from public."Transaction_History"
where idempotency_key is not null;
alter table ledger.keys enable row level security;
create trigger refuse_change before update or delete or truncate on ledger.keys
for each statement execute function ledger.refuse_change();

create function ledger.keep_key() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  insert into ledger.keys (user_id, idempotency_key) values (new.user_id, new.idempotency_key);
  return null;
end
$$;
revoke all on function ledger.keep_key() from public, anon, authenticated, service_role;

-- The existing table becomes the first partition. It keeps its indexes and refuse_change.
drop trigger verify_entry on public."Transaction_History";
alter table public."Transaction_History" rename to history_until_2028;
alter table public.history_until_2028 set schema ledger;
revoke all on ledger.history_until_2028 from service_role;

create table public."Transaction_History" (
  like ledger.history_until_2028 including defaults including constraints,
  constraint transaction_history_user_id_fkey
  foreign key (user_id) references public."Users" (card_id),
  constraint transaction_history_item_fkey foreign key (item) references public."Items" (id)
) partition by range (created_at);
-- One for each year, with its own unique indexes: the whole table cannot have them.
create table ledger.history_2028 (like ledger.history_until_2028 including all);
create trigger refuse_change before update or delete or truncate on ledger.history_2028
for each statement execute function ledger.refuse_change();
-- The default partition: without it, debits of a year without a partition would fail.
create table ledger.history_rest (like ledger.history_until_2028 including all);
create trigger refuse_change before update or delete or truncate on ledger.history_rest
for each statement execute function ledger.refuse_change();
alter table public."Transaction_History"
attach partition ledger.history_until_2028 for values from (minvalue) to ('2028-01-01Z');
alter table public."Transaction_History"
attach partition ledger.history_2028 for values from ('2028-01-01Z') to ('2029-01-01Z');
alter table public."Transaction_History" attach partition ledger.history_rest default;

create trigger verify_entry before insert on public."Transaction_History"
for each row execute function ledger.verify_entry();
create trigger keep_key after insert on public."Transaction_History"
for each row when (new.idempotency_key is not null) execute function ledger.keep_key();
create trigger refuse_change before update or delete on public."Transaction_History"
for each statement execute function ledger.refuse_change();
create trigger refuse_truncate before truncate on public."Transaction_History"
for each statement execute function ledger.refuse_change();

alter table public."Transaction_History" enable row level security;
revoke all on public."Transaction_History" from public, anon, authenticated, service_role;
grant select on public."Transaction_History" to service_role;
commit;
analyze public."Transaction_History";
