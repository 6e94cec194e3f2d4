-- Example users and items. If the rows exist already, nothing changes.

insert into public."Users" (card_id, name, balance, active) values
(1001, 'Alice', 5000, true),
(1002, 'Bob', 3500, true),
(1003, 'Carol, deactivated', 2000, false),
(1004, 'Dan, without money', 0, true),
(9007199254740993, 'Eve, with a long card number', 120000, true)
on conflict (card_id) do nothing;

insert into public."Items" (id, name, price, barcode_id, active) values
('550e8400-e29b-41d4-a716-446655440000', 'Coffee', 350, 7310865004703, true),
('550e8400-e29b-41d4-a716-446655440001', 'Sandwich', 650, 7310865004710, true),
('550e8400-e29b-41d4-a716-446655440002', 'Tap water', 0, null, true),
('550e8400-e29b-41d4-a716-446655440003', 'Last year''s calendar', 100, null, false)
on conflict (id) do nothing;
