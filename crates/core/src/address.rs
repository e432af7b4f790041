//! What a channel is called and which of the two kinds it is.

use std::{fmt, sync::Arc};

use crate::{Error, ErrorKind, Result};

/// The longest channel name, in bytes; leaves room for suffixes such as `.dlq` under every broker's limit.
pub const MAX_NAME_BYTES: usize = 200;

/// The two kinds of channel, named by intent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ChannelKind {
    /// Each message goes to one consumer.
    Queue,
    /// Each message goes to every group, and to one member inside a group.
    Topic,
}

/// Kind and name of a channel. The name reaches the broker untouched; a backend refuses names that its
/// broker cannot carry and never rewrites one into another.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address {
    kind: ChannelKind,
    name: Arc<str>,
}

impl Address {
    /// A queue.
    #[must_use]
    pub fn queue(name: impl Into<Arc<str>>) -> Self {
        Self { kind: ChannelKind::Queue, name: name.into() }
    }

    /// A topic.
    #[must_use]
    pub fn topic(name: impl Into<Arc<str>>) -> Self {
        Self { kind: ChannelKind::Topic, name: name.into() }
    }

    /// Queue or topic.
    #[must_use]
    pub fn kind(&self) -> ChannelKind {
        self.kind
    }

    /// The name as the user wrote it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The name, shared.
    #[must_use]
    pub fn shared_name(&self) -> Arc<str> {
        Arc::clone(&self.name)
    }

    /// The queue that keeps this channel's dead letters unless the failure policy names another:
    /// `<name>.dlq`, or `<name>.<group>.dlq` for a group of a topic. A topic's name may be a pattern, which a queue's
    /// may not: characters that brokers use as wildcards (`+ # * >`) become `_`.
    #[must_use]
    pub fn dead_letters(&self, group: Option<&str>) -> Self {
        let name = match self.kind {
            ChannelKind::Queue => self.name.to_string(),
            ChannelKind::Topic => self.name.replace(['+', '#', '*', '>'], "_"),
        };
        match group {
            Some(group) => Self::queue(format!("{name}.{group}.dlq")),
            None => Self::queue(format!("{name}.dlq")),
        }
    }

    /// Checks the rules that every backend shares: 1 to 200 bytes, no control character, no
    /// white space at either end.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] naming the rule.
    pub fn check(&self) -> Result<()> {
        let name = self.name();
        let rule = if name.is_empty() {
            "is empty"
        } else if name.len() > MAX_NAME_BYTES {
            "is longer than 200 bytes"
        } else if name.chars().any(char::is_control) {
            "holds a control character"
        } else if name.trim() != name {
            "starts or ends with white space"
        } else {
            return Ok(());
        };
        Err(Error::new(ErrorKind::InvalidInput, format!("the {} name {name:?} {rule}", self.kind))
            .with_hint("use 1 to 200 bytes without control characters"))
    }
}

impl fmt::Display for ChannelKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Queue => "queue",
            Self::Topic => "topic",
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.name)
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
