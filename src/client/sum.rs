//! The checksums that S3 has, computed as bytes come by.

use crc_fast::CrcAlgorithm;
use sha2::Digest as _;

use crate::pb;
use crate::pb::checksum::Value;

/// How a checksum is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Algorithm {
    Crc32,
    Crc32c,
    Crc64Nvme,
    Sha1,
    Sha256,
}

/// A checksum in the making.
#[derive(Clone)]
pub(super) enum Sum {
    Crc(Algorithm, crc_fast::Digest),
    Sha1(sha1::Sha1),
    Sha256(sha2::Sha256),
}

impl Algorithm {
    /// That of `checksum`.
    pub(super) fn of(checksum: &Value) -> Self {
        match checksum {
            Value::Crc32(_) => Self::Crc32,
            Value::Crc32c(_) => Self::Crc32c,
            Value::Crc64nvme(_) => Self::Crc64Nvme,
            Value::Sha1(_) => Self::Sha1,
            Value::Sha256(_) => Self::Sha256,
        }
    }

    /// Whether checksums of parts make the checksum of the whole.
    pub(super) fn combines(self) -> bool {
        !matches!(self, Self::Sha1 | Self::Sha256)
    }
}

impl Sum {
    pub(super) fn new(algorithm: Algorithm) -> Self {
        let crc = |of| Self::Crc(algorithm, crc_fast::Digest::new(of));
        match algorithm {
            Algorithm::Crc32 => crc(CrcAlgorithm::Crc32IsoHdlc),
            Algorithm::Crc32c => crc(CrcAlgorithm::Crc32Iscsi),
            Algorithm::Crc64Nvme => crc(CrcAlgorithm::Crc64Nvme),
            Algorithm::Sha1 => Self::Sha1(sha1::Sha1::new()),
            Algorithm::Sha256 => Self::Sha256(sha2::Sha256::new()),
        }
    }

    pub(super) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Crc(_, digest) => digest.update(bytes),
            Self::Sha1(digest) => digest.update(bytes),
            Self::Sha256(digest) => digest.update(bytes),
        }
    }

    /// Goes on with the bytes that `next` was computed of, if
    /// [`Algorithm::combines`].
    pub(super) fn append(&mut self, next: &Self) {
        if let (Self::Crc(a, digest), Self::Crc(b, next)) = (self, next)
            && a == b
        {
            digest.combine(next);
        }
    }

    pub(super) fn value(&self) -> Value {
        match self {
            Self::Crc(algorithm, digest) => {
                let bytes = digest.finalize().to_be_bytes().to_vec();
                match algorithm {
                    Algorithm::Crc32 => Value::Crc32(bytes[4..].to_vec()),
                    Algorithm::Crc32c => Value::Crc32c(bytes[4..].to_vec()),
                    _ => Value::Crc64nvme(bytes),
                }
            }
            Self::Sha1(digest) => Value::Sha1(digest.clone().finalize().to_vec()),
            Self::Sha256(digest) => Value::Sha256(digest.clone().finalize().to_vec()),
        }
    }

    pub(super) fn checksum(&self) -> pb::Checksum {
        pb::Checksum { value: Some(self.value()) }
    }
}

/// For people: the algorithm, and the value in hexadecimal.
pub(super) fn text(checksum: &Value) -> String {
    let (name, bytes) = match checksum {
        Value::Crc32(bytes) => ("crc32", bytes),
        Value::Crc32c(bytes) => ("crc32c", bytes),
        Value::Crc64nvme(bytes) => ("crc64nvme", bytes),
        Value::Sha1(bytes) => ("sha1", bytes),
        Value::Sha256(bytes) => ("sha256", bytes),
    };
    bytes.iter().fold(format!("{name}:"), |text, byte| format!("{text}{byte:02x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Algorithm; 5] =
        [Algorithm::Crc32, Algorithm::Crc32c, Algorithm::Crc64Nvme, Algorithm::Sha1, Algorithm::Sha256];

    /// The check values of the CRC catalogue, and those of FIPS 180 by `sha1sum`
    /// and `sha256sum`.
    #[test]
    fn check_values() {
        let checks = [
            "crc32:cbf43926",
            "crc32c:e3069283",
            "crc64nvme:ae8b14860a799888",
            "sha1:f7c3bc1d808e04732adf679965ccc34ca7ae3441",
            "sha256:15e2b0d3c33891ebb0f1ef609ec419420c20e320ce94c65fbc8c3312448eb225",
        ];
        for (algorithm, check) in ALL.into_iter().zip(checks) {
            let mut sum = Sum::new(algorithm);
            sum.update(b"1234");
            sum.update(b"56789");
            assert_eq!(text(&sum.value()), check);
            assert_eq!(Algorithm::of(&sum.value()), algorithm);
        }
    }

    #[test]
    fn parts_make_the_whole() {
        let bytes: Vec<u8> = (0..100_000_u32).map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
        for algorithm in ALL.into_iter().filter(|algorithm| algorithm.combines()) {
            let mut whole = Sum::new(algorithm);
            whole.update(&bytes);
            let mut parts = Sum::new(algorithm);
            for part in [&bytes[..0], &bytes[..1], &bytes[1..70_000], &bytes[70_000..]] {
                let mut sum = Sum::new(algorithm);
                sum.update(part);
                parts.append(&sum);
            }
            assert_eq!(parts.value(), whole.value(), "{algorithm:?}");
        }
    }
}
