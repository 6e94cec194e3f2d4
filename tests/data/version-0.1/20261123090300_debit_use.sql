-- Charging a user for an item. The service calls debit_use, debit_use_batch and find_payment,
-- nothing else.
--
-- Outcomes, in the order of checking:
--   user_not_found          no such user; not remembered
--   (an earlier outcome)    the key was used before for the same item and expected price
--   idempotency_key_reused  the key was used before for something else
--   user_inactive           the user is switched off
--   item_not_found          no such item
--   item_inactive           the item is not for sale
--   price_changed           the caller expected another price; carries "price"
--   insufficient_funds      the balance is below the price
--   debited                 the entry and the new balance are written
-- and of debit_use_batch alone:
--   busy                    somebody holds the user's row; nothing was done
--
-- Declines are returned, not raised: an error would roll back the memory of the decline.
-- The new balance is written by the entry's trigger.

-- A debit_use from older days would make the call ambiguous to PostgREST, so it goes.
do $$
declare
  older regprocedure;
begin
  for older in
    select oid::regprocedure from pg_proc
    where pronamespace = 'public'::regnamespace and proname in ('debit_use', 'debit_use_batch', 'find_payment')
      and pg_get_function_identity_arguments(oid) not in (
        'user_id_input bigint, item_input uuid, idempotency_key_input text, '
        'expected_price_input bigint',
        'debits jsonb',
        'user_id_input bigint, idempotency_key_input text'
      )
  loop
    execute 'drop function ' || older;
  end loop;
end
$$;

create or replace function ledger.find_outcome(
  user_id_input bigint, idempotency_key_input text
) returns jsonb
language sql stable security invoker
set search_path = ''
as $$
  select jsonb_build_object(
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
  select jsonb_strip_nulls(jsonb_build_object('price', decline.price)) || jsonb_build_object(
    'outcome', decline.outcome,
    'item_id', decline.item_id,
    'expected_price', decline.expected_price,
    'replayed', true
  )
  from ledger.declines as decline
  where decline.user_id = user_id_input and decline.idempotency_key = idempotency_key_input
$$;

create or replace function ledger.debit(
  user_id_input bigint,
  item_input uuid,
  idempotency_key_input text,
  expected_price_input bigint
) returns jsonb
language plpgsql volatile security invoker
set search_path = ''
as $$
declare
  buyer public."Users"%rowtype;
  wanted public."Items"%rowtype;
  entry public."Transaction_History"%rowtype;
  earlier jsonb;
  refusal text;
  answer jsonb := jsonb_build_object(
    'item_id', item_input, 'expected_price', expected_price_input, 'replayed', false
  );
begin
  -- Debits of one user wait for each other here; buyers of one item never do.
  select * into buyer from public."Users" where card_id = user_id_input for no key update;
  if not found then
    return answer || jsonb_build_object('outcome', 'user_not_found');
  end if;

  earlier := ledger.find_outcome(user_id_input, idempotency_key_input);
  if earlier -> 'item_id' = answer -> 'item_id'
    and earlier -> 'expected_price' = answer -> 'expected_price' then
    return earlier;
  elsif earlier is not null then
    return answer || jsonb_build_object('outcome', 'idempotency_key_reused');
  end if;

  -- A comparison with null is not true: where no item was found, the second line catches it.
  select * into wanted from public."Items" where id = item_input;
  refusal := case
    when not buyer.active then 'user_inactive'
    when wanted.id is null then 'item_not_found'
    when not wanted.active then 'item_inactive'
    when wanted.price <> expected_price_input then 'price_changed'
    when wanted.price > buyer.balance then 'insufficient_funds'
  end;

  if refusal is not null then
    if refusal = 'price_changed' then
      answer := answer || jsonb_build_object('price', wanted.price);
    end if;
    if idempotency_key_input is not null then
      insert into ledger.declines (
        user_id, idempotency_key, outcome, item_id, expected_price, price
      ) values (
        user_id_input, idempotency_key_input, refusal, item_input, expected_price_input,
        (answer ->> 'price')::bigint
      );
    end if;
    return answer || jsonb_build_object('outcome', refusal);
  end if;

  insert into public."Transaction_History" (
    user_id, item, amount_delta, balance_after, kind, idempotency_key, expected_price
  ) values (
    user_id_input, item_input, -wanted.price, buyer.balance - wanted.price, 'debit',
    idempotency_key_input, expected_price_input
  )
  returning * into entry;

  return answer || jsonb_build_object(
    'outcome', 'debited',
    'transaction_id', entry.id,
    'user_id', entry.user_id,
    'amount', -entry.amount_delta,
    'new_balance', entry.balance_after,
    'created_at', entry.created_at
  );
end
$$;

create or replace function public.debit_use(
  user_id_input bigint,
  item_input uuid,
  idempotency_key_input text default null,
  expected_price_input bigint default null
) returns jsonb
language sql volatile security invoker
set search_path = ''
set lock_timeout = '2s'
set statement_timeout = '4s'
as $$
  select ledger.debit(user_id_input, item_input, idempotency_key_input, expected_price_input)
$$;

create or replace function public.debit_use_batch(debits jsonb) returns jsonb
language plpgsql volatile security invoker
set search_path = ''
set lock_timeout = '2s'
set statement_timeout = '4s'
as $$
declare
  locked bigint[];
  wish record;
  outcomes jsonb[] := '{}';
begin
  -- In the order of their ids, so that no two batches wait for each other; a row that somebody
  -- holds is passed over, so that one stuck user does not hold up the others.
  select array_agg(users.card_id) into locked from (
    select card_id from public."Users"
    where card_id in (select (debit ->> 'user_id')::bigint from jsonb_array_elements(debits) debit)
    order by card_id
    for no key update skip locked
  ) as users;

  for wish in
    select debit.* from rows from (
      jsonb_to_recordset(debits) as (
        user_id bigint, item_id uuid, idempotency_key text, expected_price bigint
      )
    ) with ordinality as debit (user_id, item_id, idempotency_key, expected_price, place)
    order by debit.place
  loop
    if wish.user_id = any(locked)
      or not exists (select from public."Users" where card_id = wish.user_id) then
      outcomes := outcomes || ledger.debit(
        wish.user_id, wish.item_id, wish.idempotency_key, wish.expected_price
      );
    else
      outcomes := outcomes || jsonb_build_object(
        'outcome', 'busy',
        'item_id', wish.item_id,
        'expected_price', wish.expected_price,
        'replayed', false
      );
    end if;
  end loop;
  return to_jsonb(outcomes);
end
$$;

create or replace function public.find_payment(
  user_id_input bigint, idempotency_key_input text
) returns jsonb
language sql stable security invoker
set search_path = ''
set lock_timeout = '2s'
set statement_timeout = '4s'
as $$
  select ledger.find_outcome(user_id_input, idempotency_key_input)
$$;

comment on function ledger.debit is
'The rules of a debit; the only place that has them. Waits for the user''s row.';
comment on function ledger.find_outcome is
'What was answered under a key of a user, with "replayed" true, or null.';
comment on function public.debit_use is
'Charge a user for an item at its present price, in one transaction; returns the outcome.';
comment on function public.debit_use_batch is
'Debits by the rules of debit_use, in one transaction; the outcomes are in the order given.';
comment on function public.find_payment is
'The outcome recorded under a key of a user, or null; reads only.';

revoke all on function
ledger.find_outcome(bigint, text),
ledger.debit(bigint, uuid, text, bigint),
public.debit_use(bigint, uuid, text, bigint),
public.debit_use_batch(jsonb),
public.find_payment(bigint, text)
from public, anon, authenticated, service_role;

grant execute on function
ledger.find_outcome(bigint, text),
ledger.debit(bigint, uuid, text, bigint),
public.debit_use(bigint, uuid, text, bigint),
public.debit_use_batch(jsonb),
public.find_payment(bigint, text)
to service_role;

notify pgrst, 'reload schema';
