//! How one channel may differ from the settings of its connection.

use std::sync::Arc;

use polymq_core::{Error, ErrorKind, Result};

use crate::{
    NAME,
    config::{AmqpConfig, Declare, QueueType},
};

/// What holds for a channel.
#[derive(Debug)]
pub(crate) struct Extra {
    pub(crate) exchange: Arc<str>,
    pub(crate) queue_type: QueueType,
    pub(crate) persistent: bool,
    pub(crate) declare: Declare,
}

impl Extra {
    /// The settings, and what a call says beside them.
    pub(crate) fn of(settings: &AmqpConfig, extra: &[(String, String)], declare: bool) -> Result<Self> {
        let mut found = Self {
            exchange: settings.exchange.as_str().into(),
            queue_type: settings.queue_type,
            persistent: settings.persistent,
            declare: match settings.declare {
                Declare::Auto if !declare => Declare::Passive,
                configured => configured,
            },
        };
        for (key, value) in extra {
            match (key.as_str(), value.as_str()) {
                ("exchange", name) if (1..=255).contains(&name.len()) => found.exchange = name.into(),
                ("queue_type", "classic") => found.queue_type = QueueType::Classic,
                ("queue_type", "quorum") => found.queue_type = QueueType::Quorum,
                ("persistent", "true") => found.persistent = true,
                ("persistent", "false") => found.persistent = false,
                ("exchange" | "queue_type" | "persistent", _) => {
                    return Err(config(format!("option {key:?}: {value:?} is not valid")).with_hint(
                        "exchange is a name, queue_type is classic or quorum, persistent is true or false",
                    ));
                }
                _ => {
                    return Err(config(format!("unknown option {key:?}; known: exchange, queue_type, persistent")));
                }
            }
        }
        Ok(found)
    }
}

#[cold]
fn config(sentence: String) -> Error {
    Error::new(ErrorKind::Config, sentence).with_backend(NAME)
}
