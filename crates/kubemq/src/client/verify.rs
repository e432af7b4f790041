//! Whether bodies came as they were sent: their MD5, where the server tells it.

use std::fmt;

use md5::{Digest, Md5};
use polymq_core::{Error, ErrorKind, Result};
use polymq_kubemq_proto::QueueMessage;

use crate::NAME;

/// The source of the error about bodies whose MD5 is not the one that the server tells.
///
/// `KubeMq::receive` takes messages off their queue, so this is where they are, the good ones too.
#[derive(Debug, Clone)]
pub struct Corrupted {
    /// All messages of the answer, in order.
    pub messages: Vec<QueueMessage>,
    /// Where the bad ones are in it.
    pub bad: Vec<usize>,
}

impl fmt::Display for Corrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} bodies are not what was sent", self.bad.len(), self.messages.len())
    }
}

impl std::error::Error for Corrupted {}

/// The messages, if the body of each is what the server says it is.
pub(super) fn verified(messages: Vec<QueueMessage>) -> Result<Vec<QueueMessage>> {
    let bad: Vec<_> = messages.iter().enumerate().filter(|(_, message)| !is_whole(message)).map(|(at, _)| at).collect();
    let Some(first) = bad.first().and_then(|at| messages.get(*at)) else { return Ok(messages) };
    let sentence = format!(
        "the body of message {:?} of queue {:?} does not have the MD5 that the server tells",
        first.message_id, first.channel
    );
    let source = Corrupted { bad, messages };
    Err(Error::new(ErrorKind::Decode, sentence)
        .with_backend(NAME)
        .with_operation("receive")
        .with_hint("the messages are in the error's source, polymq_kubemq::Corrupted")
        .with_source(source))
}

/// Servers that tell no MD5 are believed.
fn is_whole(message: &QueueMessage) -> bool {
    let told = message.attributes.as_ref().map_or("", |attributes| attributes.md5_of_body.as_str());
    told.is_empty() || told.eq_ignore_ascii_case(&format!("{:x}", Md5::digest(&message.body)))
}
