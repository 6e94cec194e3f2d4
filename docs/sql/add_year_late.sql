-- Make the default partition the partition of a year that has begun, in a ledger partitioned by
-- time. It may only have entries of that year. See "By time" in docs/scaling.md. Replace the years.

begin;
set local lock_timeout = '5s';
set local statement_timeout = 0;
alter table public."Transaction_History" detach partition ledger.history_rest;
alter table ledger.history_rest rename to history_2029;
alter table public."Transaction_History"
attach partition ledger.history_2029 for values from ('2029-01-01Z') to ('2030-01-01Z');
create table ledger.history_rest (like ledger.history_2029 including all);
create trigger refuse_change before update or delete or truncate on ledger.history_rest
for each statement execute function ledger.refuse_change();
alter table public."Transaction_History" attach partition ledger.history_rest default;
commit;
