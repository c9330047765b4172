//! The strides of a tensor in memory, in elements.

/// Returns the number of elements from the first to the last, with the gaps between them; 0 if there are none, and
/// `u64::MAX` if it does not fit.
pub(crate) fn extent(shape: &[u64], strides: &[u64]) -> u64 {
    if shape.contains(&0) {
        return 0;
    }
    let dimensions = shape.iter().zip(strides);
    dimensions.fold(1, |extent, (&dim, &stride)| extent.saturating_add(stride.saturating_mul(dim - 1)))
}

/// Returns whether each dimension steps over all elements of those with smaller strides. No two elements share memory then.
/// Some layouts in which none do are not of this kind.
pub(crate) fn are_nested(shape: &[u64], strides: &[u64]) -> bool {
    let mut dimensions: Vec<(u64, u64)> =
        strides.iter().copied().zip(shape.iter().copied()).filter(|&(_, dim)| dim > 1).collect();
    dimensions.sort_unstable();
    let mut extent = 1u64;
    shape.contains(&0)
        || dimensions.iter().all(|&(stride, dim)| {
            let is_outside = stride >= extent;
            extent = extent.saturating_add(stride.saturating_mul(dim - 1));
            is_outside
        })
}

/// Returns whether the last dimension is contiguous, and each other one steps over exactly those after it.
pub(crate) fn are_row_major(shape: &[u64], strides: &[u64]) -> bool {
    let mut extent = 1u64;
    shape.contains(&0)
        || shape.iter().zip(strides).rev().filter(|&(&dim, _)| dim > 1).all(|(&dim, &stride)| {
            let is_next = stride == extent;
            extent = extent.saturating_mul(dim);
            is_next
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_contain_the_gaps() {
        assert_eq!(extent(&[], &[]), 1);
        assert_eq!(extent(&[3, 4], &[4, 1]), 12);
        assert_eq!(extent(&[3, 4], &[1, 3]), 12);
        assert_eq!(extent(&[3, 4], &[10, 2]), 27);
        assert_eq!(extent(&[3, 0], &[u64::MAX, 1]), 0);
        assert_eq!(extent(&[1, 2], &[u64::MAX, 1]), 2);
        assert_eq!(extent(&[3, 2], &[u64::MAX / 2, 3]), u64::MAX);
        assert_eq!(extent(&[4], &[u64::MAX / 2]), u64::MAX);
    }

    #[test]
    fn elements_that_share_memory_are_not_nested() {
        assert!(are_nested(&[], &[]));
        assert!(are_nested(&[3, 4], &[4, 1]) && are_nested(&[3, 4], &[1, 3]) && are_nested(&[3, 4], &[9, 2]));
        assert!(are_nested(&[1, 4], &[0, 1]) && are_nested(&[0, 4], &[0, 0]));
        assert!(!are_nested(&[3, 4], &[3, 1]) && !are_nested(&[3, 4], &[1, 2]));
        assert!(!are_nested(&[2], &[0]) && !are_nested(&[2, 2], &[1, 1]));
        assert!(!are_nested(&[4, 3, 2], &[u64::MAX / 2, u64::MAX / 2, 1]));
    }

    #[test]
    fn row_major_strides_are_those_without_gaps() {
        assert!(
            are_row_major(&[], &[])
                && are_row_major(&[3, 4], &[4, 1])
                && are_row_major(&[3, 1, 4], &[4, 9, 1])
        );
        assert!(are_row_major(&[0, 4], &[9, 9]));
        assert!(
            !are_row_major(&[3, 4], &[5, 1])
                && !are_row_major(&[3, 4], &[1, 3])
                && !are_row_major(&[3], &[2])
        );
    }
}
