-- Partition the ledger by user. See "A partitioned ledger" in docs/scaling.md before you run this.
-- Debits wait, or get ledger_unavailable, until it ends. psql -v ON_ERROR_STOP=1 -f FILE

begin;
set local lock_timeout = '5s';
set local statement_timeout = 0;
lock table public."Users", public."Transaction_History" in access exclusive mode;
alter table public."Transaction_History" rename to history_before;
alter table public.history_before set schema ledger;

create table public."Transaction_History" (
  like ledger.history_before including defaults including constraints
) partition by hash (user_id);
do $$
begin
  for part in 0..15 loop
    execute format(
      'create table ledger.history_%s partition of public."Transaction_History" '
      'for values with (modulus 16, remainder %s)', part, part
    );
    -- A statement trigger fires only for the table in the statement, so each partition has its own.
    execute format(
      'create trigger refuse_change before update or delete or truncate on ledger.history_%s '
      'for each statement execute function ledger.refuse_change()', part
    );
  end loop;
end
$$;
-- Before the triggers exist: they would verify each entry again.
insert into public."Transaction_History" select * from ledger.history_before;
alter table public."Transaction_History"
add constraint transaction_history_pkey primary key (user_id, id),
add constraint transaction_history_user_id_fkey
foreign key (user_id) references public."Users" (card_id),
add constraint transaction_history_item_fkey foreign key (item) references public."Items" (id);
drop table ledger.history_before;
create unique index transaction_history_user_id_seq_idx
on public."Transaction_History" (user_id, seq);
create unique index transaction_history_user_id_idempotency_key_idx
on public."Transaction_History" (user_id, idempotency_key)
where idempotency_key is not null;

create trigger verify_entry before insert on public."Transaction_History"
for each row execute function ledger.verify_entry();
create trigger refuse_change before update or delete on public."Transaction_History"
for each statement execute function ledger.refuse_change();
create trigger refuse_truncate before truncate on public."Transaction_History"
for each statement execute function ledger.refuse_change();

alter table public."Transaction_History" enable row level security;
revoke all on public."Transaction_History" from public, anon, authenticated, service_role;
grant select on public."Transaction_History" to service_role;
commit;
analyze public."Transaction_History";
