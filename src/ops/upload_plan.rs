//! The parts of an upload: pure arithmetic.

use serde::{Deserialize, Serialize};

/// S3's limits on parts and what they make.
/// <https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html>
pub const MIN_PART: u64 = 5 << 20;
/// The largest part, in bytes.
pub const MAX_PART: u64 = 5 << 30;
/// How many parts there may be.
pub const MAX_PARTS: u64 = 10_000;
/// The largest object, in bytes.
pub const MAX_SIZE: u64 = 5 << 40;

/// The part size of what is small enough: many parts at a time, and little to
/// send again.
const USUAL_PART: u64 = 8 << 20;
const MIB: u64 = 1 << 20;

/// How an object is cut into parts.
///
/// INVARIANT: all parts but the last have `part_size` bytes, which S3 takes;
/// the last has the rest, which is at least 1 byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    size: u64,
    part_size: u64,
}

impl Plan {
    /// A plan for an object of `size` bytes, in parts of `part_size` bytes, or
    /// of 8 MiB if nobody says and 10,000 of them do.
    ///
    /// # Errors
    /// The field that is wrong, and what it must be.
    pub fn new(size: u64, part_size: Option<u64>) -> Result<Self, (&'static str, String)> {
        if size <= MIN_PART {
            return Err(("size", format!("be more than 5 MiB ({MIN_PART}): for less, use Presign with `upload`")));
        }
        if size > MAX_SIZE {
            return Err(("size", format!("be at most 5 TiB ({MAX_SIZE})")));
        }
        let least = size.div_ceil(MAX_PARTS).max(MIN_PART);
        let part_size = part_size.unwrap_or_else(|| least.next_multiple_of(MIB).max(USUAL_PART));
        if !(least..=MAX_PART).contains(&part_size) {
            let must = format!("be {least} to {MAX_PART} bytes: S3 takes parts of 5 MiB to 5 GiB, and 10,000 of them");
            return Err(("part_size", must));
        }
        Ok(Self { size, part_size })
    }

    /// The size of the object, in bytes.
    #[must_use]
    pub fn size(self) -> u64 {
        self.size
    }

    /// The size of each part but the last, in bytes.
    #[must_use]
    pub fn part_size(self) -> u64 {
        self.part_size
    }

    /// How many parts there are, numbered from 1.
    #[must_use]
    pub fn count(self) -> u32 {
        // 10,000 at the most.
        u32::try_from(self.size.div_ceil(self.part_size)).unwrap_or(u32::MAX)
    }

    /// The size of a part, in bytes. `None`: there is no such part.
    #[must_use]
    pub fn length(self, number: u32) -> Option<u64> {
        let before = u64::from(number.checked_sub(1)?).checked_mul(self.part_size)?;
        let left = self.size.checked_sub(before).filter(|left| *left > 0)?;
        Some(left.min(self.part_size))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn parts_cover_every_byte_once_within_the_limits(
            size in prop_oneof![MIN_PART + 1..=MAX_SIZE, MIN_PART + 1..200 * MIB],
            part_size in proptest::option::of(prop_oneof![0..=2 * MAX_PART, MIN_PART..=64 * MIB]),
        ) {
            match Plan::new(size, part_size) {
                Ok(plan) => {
                    prop_assert!((1..=10_000).contains(&plan.count()));
                    prop_assert!(part_size.is_none_or(|asked| asked == plan.part_size()));
                    let mut sum = 0;
                    for number in 1..=plan.count() {
                        let length = plan.length(number).unwrap();
                        prop_assert!((1..=MAX_PART).contains(&length));
                        prop_assert!(number == plan.count() || length == plan.part_size() && length >= MIN_PART);
                        sum += length;
                    }
                    prop_assert_eq!(sum, size);
                    prop_assert_eq!((plan.length(0), plan.length(plan.count() + 1)), (None, None));
                }
                Err((field, _)) => {
                    prop_assert_eq!(field, "part_size");
                    let asked = part_size.unwrap();
                    prop_assert!(!(MIN_PART..=MAX_PART).contains(&asked) || size.div_ceil(asked) > MAX_PARTS);
                }
            }
        }

        #[test]
        fn sizes_that_s3_does_not_take_are_refused(size in prop_oneof![0..=MIN_PART, MAX_SIZE + 1..=u64::MAX]) {
            prop_assert_eq!(Plan::new(size, None).unwrap_err().0, "size");
        }
    }

    #[test]
    fn the_usual_plans() {
        let plan = |size| Plan::new(size, None).map(|plan| (plan.part_size(), plan.count())).unwrap();
        assert_eq!(plan(MIN_PART + 1), (8 * MIB, 1));
        assert_eq!(plan(100 * MIB + 1), (8 * MIB, 13));
        assert_eq!(plan(80_000 * MIB), (8 * MIB, 10_000));
        assert_eq!(plan(80_000 * MIB + 1), (9 * MIB, 8_889));
        assert_eq!(plan(MAX_SIZE), (525 * MIB, 9_987));
    }
}
