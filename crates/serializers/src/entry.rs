use std::fmt;
use std::sync::Arc;

use crate::serializer::Serializer;

/// A serializer submitted by a linked crate; [`Serializers::linked`](crate::Serializers::linked) collects
/// them.
pub struct SerializerEntry {
    make: fn() -> Arc<dyn Serializer>,
}

impl SerializerEntry {
    /// An entry that makes its serializer with `make`, once for each registry.
    pub const fn new(make: fn() -> Arc<dyn Serializer>) -> Self {
        Self { make }
    }

    /// Makes the serializer.
    pub fn make(&self) -> Arc<dyn Serializer> {
        (self.make)()
    }
}

impl fmt::Debug for SerializerEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SerializerEntry").field(&self.make()).finish()
    }
}

inventory::collect!(SerializerEntry);

/// Makes a [`Serializer`](crate::Serializer) part of every
/// [`Serializers::linked`](crate::Serializers::linked) of the programs that link this crate.
///
/// The argument is an expression that makes the serializer; it may not capture anything. The macro is written
/// at module level. A crate that is a dependency but not mentioned anywhere may be left out by the linker:
/// refer to one of its items, or write `use that_crate as _;`.
///
/// It is short for
///
/// ```text
/// inventory::submit! { SerializerEntry::new(|| Arc::new(MySerializer)) }
/// ```
#[macro_export]
macro_rules! register {
    ($serializer:expr $(,)?) => {
        $crate::inventory::submit! {
            $crate::SerializerEntry::new(|| ::std::sync::Arc::new($serializer))
        }
    };
}
