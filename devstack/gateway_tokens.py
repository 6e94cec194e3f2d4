"""Authentication of the gateway: JWTs signed with HS256, such as Supabase's keys."""

from collections.abc import Mapping

import jwt

from devstack.gateway_errors import GatewayError

ANONYMOUS = "anon"


def read_claims(headers: Mapping[str, str], secret: str) -> dict[str, object]:
    """Return the claims of the token in Authorization or apikey; without a token, the role `anon`.

    Raises:
        GatewayError: the token is malformed, not signed with the secret, or expired.
    """
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    token = bearer.strip() if scheme.lower() == "bearer" else headers.get("apikey", "")
    if not token:
        return {"role": ANONYMOUS}
    parts = token.count(".") + 1
    if parts != 3:
        parse = f"CompactDecodeError Invalid number of parts: Expected 3 parts; got {parts}"
        raise _invalid_token(f"JWSError ({parse})")
    try:
        claims: dict[str, object] = jwt.decode(
            token, secret, algorithms=["HS256"], options={"verify_aud": False}
        )
    except jwt.ExpiredSignatureError:
        raise _invalid_token("JWT expired") from None
    except jwt.InvalidAlgorithmError:
        raise _invalid_token("JWSError JWSNoSignatures") from None
    except jwt.InvalidTokenError:
        raise _invalid_token("JWSError JWSInvalidSignature") from None
    return {"role": ANONYMOUS} | claims


def _invalid_token(message: str) -> GatewayError:
    challenge = f'Bearer error="invalid_token", error_description="{message}"'
    return GatewayError(401, "PGRST301", message, challenge=challenge)
