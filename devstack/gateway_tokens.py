"""Who calls the gateway: the claims of a JWT signed with HS256, as Supabase's keys are."""

from collections.abc import Mapping

import jwt

from devstack.gateway_errors import GatewayError

ANONYMOUS = "anon"


def read_claims(headers: Mapping[str, str], secret: str) -> dict[str, object]:
    """Check the token in Authorization, or else in apikey; nobody is `anon`.

    Raises:
        GatewayError: the token is not one, not signed with the secret, or has expired.
    """
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    token = bearer.strip() if scheme.lower() == "bearer" else headers.get("apikey", "")
    if not token:
        return {"role": ANONYMOUS}
    parts = token.count(".") + 1
    if parts != 3:
        parse = f"CompactDecodeError Invalid number of parts: Expected 3 parts; got {parts}"
        raise _refusal(f"JWSError ({parse})")
    try:
        claims: dict[str, object] = jwt.decode(
            token, secret, algorithms=["HS256"], options={"verify_aud": False}
        )
    except jwt.ExpiredSignatureError:
        raise _refusal("JWT expired") from None
    except jwt.InvalidAlgorithmError:
        raise _refusal("JWSError JWSNoSignatures") from None
    except jwt.InvalidTokenError:
        raise _refusal("JWSError JWSInvalidSignature") from None
    return {"role": ANONYMOUS} | claims


def _refusal(message: str) -> GatewayError:
    challenge = f'Bearer error="invalid_token", error_description="{message}"'
    return GatewayError(401, "PGRST301", message, challenge=challenge)
