"""Makes LocalStack forget keys as AWS does, from within its own process.

LocalStack remembers a key's secret for ever once it has seen it, and ignores
that a key was deactivated. Here each look-up is made afresh, and only an active
key has a secret.
"""

import os

from localstack.services.s3 import presigned_url
from moto.iam.models import iam_backends


def secret_of(access_key_id, _region):
    for account in iam_backends.values():
        for backend in account.values():
            key = backend.access_keys.get(access_key_id)
            if key is not None:
                return key.secret_access_key if key.status == "Active" else None
    return None


presigned_url.get_secret_access_key_from_access_key_id = secret_of

# The test process waits for this line.
os.write(1, b"KEY-STATUS-READY\n")
