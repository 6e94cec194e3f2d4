-- Add the partition of a year to a ledger partitioned by time, before the year begins.
-- See "By time" in docs/scaling.md. Replace the years.

create table ledger.history_2029 (like ledger.history_2028 including all);
create trigger refuse_change before update or delete or truncate on ledger.history_2029
for each statement execute function ledger.refuse_change();
alter table public."Transaction_History"
attach partition ledger.history_2029 for values from ('2029-01-01Z') to ('2030-01-01Z');
