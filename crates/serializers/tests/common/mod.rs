//! What several test binaries share.
#![allow(dead_code, reason = "each binary uses a part")]

use std::sync::Arc;

use polymq_serializers::{BoxError, Limits, Serializer, erased_serde};
use serde::{Deserialize, Serialize};

pub(crate) const LIMITS: Limits = Limits::DEFAULT;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) id: u64,
    pub(crate) note: Option<String>,
    pub(crate) lines: Vec<(String, i32)>,
}

/// A list of itself: the type that hostile nesting aims at.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Nest(pub(crate) Vec<Nest>);

/// The same through an enum, where rmp_serde does not count.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Chain {
    End,
    Link(Box<Chain>),
}

/// A third-party serializer with the identity a test gives it: MessagePack without any limit of its own.
#[derive(Debug, Clone)]
pub(crate) struct Custom {
    pub(crate) name: &'static str,
    pub(crate) content_type: &'static str,
    pub(crate) id: u16,
}

impl Custom {
    pub(crate) const fn new(name: &'static str, content_type: &'static str, id: u16) -> Self {
        Self { name, content_type, id }
    }

    pub(crate) fn arc(name: &'static str, content_type: &'static str, id: u16) -> Arc<dyn Serializer> {
        Arc::new(Self::new(name, content_type, id))
    }
}

impl Serializer for Custom {
    fn name(&self) -> &str {
        self.name
    }

    fn content_type(&self) -> &str {
        self.content_type
    }

    fn id(&self) -> u16 {
        self.id
    }

    fn encode(&self, value: &dyn erased_serde::Serialize) -> Result<Vec<u8>, BoxError> {
        Ok(rmp_serde::to_vec(value)?)
    }

    fn decode(
        &self,
        body: &[u8],
        visit: &mut dyn FnMut(&mut dyn erased_serde::Deserializer<'_>) -> Result<(), erased_serde::Error>,
    ) -> Result<(), BoxError> {
        let mut deserializer = rmp_serde::Deserializer::from_read_ref(body);
        deserializer.set_max_depth(usize::from(u16::MAX));
        visit(&mut <dyn erased_serde::Deserializer<'_>>::erase(&mut deserializer))?;
        Ok(())
    }
}
