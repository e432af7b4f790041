//! F1 to F15.

use crate::Case;

pub(super) const CASES: &[Case] = &[];
