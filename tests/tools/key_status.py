"""Makes LocalStack judge presigned requests by what IAM and STS say of their key at that moment, as AWS does.

LocalStack runs this inside its process from `<FILESYSTEM_ROOT>/etc/localstack/init/ready.d/`. As it comes, it remembers
a key's secret for ever once it has seen it, ignores whether the key is active, takes the secret of an unknown key to
be `test`, knows no end of a session, and never looks at the signature of a POST form. With this, the answers are:

- a key that IAM does not have, or has as inactive: 403 `InvalidAccessKeyId`
- a session that has run out: 400 `ExpiredToken`
- a POST form with a wrong signature: 403 `SignatureDoesNotMatch`

The key `test` with the secret `test`, LocalStack's root, goes on signing whatever it likes. Requests signed in their
headers are not touched: LocalStack accepts every one, whoever signed it and how.
"""

import hashlib
import hmac

from localstack.aws.api import CommonServiceException
from localstack.services.s3 import presigned_url, provider
from moto.core.utils import utcnow
from moto.iam.models import iam_backends
from moto.sts.models import sts_backends

# Fail at start rather than protect nothing, should a newer LocalStack have moved what is replaced below.
for module, name in (
    (presigned_url, "get_secret_access_key_from_access_key_id"),
    (presigned_url, "validate_post_policy"),
    (provider, "validate_post_policy"),
):
    assert callable(getattr(module, name, None)), f"{module.__name__} has no {name}"

ROOT_KEY = "test"
ROOT_SECRET = "test"


def backends(of):
    """Every account's and partition's state: a key id says nothing reliable about its account."""
    return [backend for account in list(of.values()) for backend in list(account.values())]


def secret_of(access_key_id, region):
    """The secret that a request signed with this key must have been signed with, if the key is good right now."""
    if access_key_id == ROOT_KEY:
        return ROOT_SECRET

    for iam in backends(iam_backends):
        key = iam.access_keys.get(access_key_id)
        if key is None:
            continue
        if key.status != "Active":
            break
        for sts in backends(sts_backends):
            session = sts.get_assumed_role_from_access_key(access_key_id)
            if session is not None and session.expiration <= utcnow():
                raise CommonServiceException("ExpiredToken", "The provided token has expired.", 400)
        return key.secret_access_key

    raise CommonServiceException(
        "InvalidAccessKeyId",
        "The AWS Access Key Id you provided does not exist in our records.",
        403,
    )


def policy_signature(secret, credential, policy):
    """The SigV4 signature of a POST policy: `credential` is `key/date/region/service/aws4_request`."""
    key = b"AWS4" + secret.encode()
    for part in credential.split("/")[1:]:
        key = hmac.digest(key, part.encode(), hashlib.sha256)
    return hmac.new(key, policy.encode(), hashlib.sha256).hexdigest()


validate_conditions = presigned_url.validate_post_policy


def validate_post_policy(request_form, additional_policy_metadata):
    """LocalStack's own check of the fields and conditions, after the check of the signature that it lacks."""
    form = {name.lower(): value for name, value in request_form.items()}
    policy, signature = form.get("policy"), form.get("x-amz-signature")
    credential = form.get("x-amz-credential", "")
    # A form that lacks one of them is for LocalStack to refuse.
    if policy and signature and credential:
        key_id, region = (credential.split("/") + ["", "", ""])[0:3:2]
        expected = policy_signature(secret_of(key_id, region), credential, policy)
        if not hmac.compare_digest(expected.encode(), signature.encode()):
            raise presigned_url.create_signature_does_not_match_sig_v2(signature, policy, key_id)
    return validate_conditions(request_form, additional_policy_metadata)


# Looked up by name in its module at each call, and imported by no other.
presigned_url.get_secret_access_key_from_access_key_id = secret_of
# The provider imported this one by name.
presigned_url.validate_post_policy = validate_post_policy
provider.validate_post_policy = validate_post_policy

# The test process waits for this line: from now on the answers prove something.
print("KEY-STATUS-READY", flush=True)
