//! Deliberately broken backends.

use std::sync::Arc;

use polymq_core::Backend;

/// The backend with the mutant of this name around it.
#[must_use]
pub fn by_name(name: Option<&str>, backend: Arc<dyn Backend>) -> Arc<dyn Backend> {
    let _ = name;
    backend
}
