"""The use case: charge a user for an item."""

from app.errors import ItemInactive
from app.ledger import Ledger
from app.products import Products
from app.schemas import DebitRequest, Payment


async def debit_user_for_item(debit: DebitRequest, products: Products, ledger: Ledger) -> Payment:
    """Charge the user for the item, if it is for sale and the ledger's rules allow it.

    Raises:
        PaymentError: nobody was charged, unless the class says that this is unknown.
    """
    item = await products.get_item(debit.item_id)
    if not item.active:
        raise ItemInactive
    return await ledger.debit(debit)
