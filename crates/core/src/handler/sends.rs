//! Messages that leave with the acknowledgement of the one that was handled.

use std::{fmt, sync::Arc};

use serde::Serialize;

use super::{IntoOutcome, Outcome};
use crate::{Address, Bus, Channel, Message, Result};

/// What a handler returns to have messages sent when its own is acknowledged.
///
/// On a route that is [`transactional`](crate::Route::transactional), all of them are sent and the message is acknowledged,
/// or none of that happens. On any other, each is accepted by the broker before the message is acknowledged: none is lost,
/// and they may be sent twice.
///
/// ```
/// use polymq_core::{Result, Sends};
///
/// async fn bill(order: u64) -> Result<Sends> {
///     Ok(Sends::new().to("invoices", order).to_topic("billed", order))
/// }
/// ```
#[derive(Default)]
#[must_use = "these are sent when a handler returns them"]
pub struct Sends(Vec<(Address, Encode)>);

type Encode = Box<dyn FnOnce(&Channel) -> Result<Message> + Send>;

impl Sends {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A value to a queue.
    pub fn to<T: Serialize + Send + 'static>(self, queue: impl Into<Arc<str>>, value: T) -> Self {
        self.and(Address::queue(queue), move |channel| channel.message(&value))
    }

    /// A value to a topic.
    pub fn to_topic<T: Serialize + Send + 'static>(self, topic: impl Into<Arc<str>>, value: T) -> Self {
        self.and(Address::topic(topic), move |channel| channel.message(&value))
    }

    /// A message as it is.
    pub fn message(self, address: Address, message: Message) -> Self {
        self.and(address, |_| Ok(message))
    }

    fn and(mut self, address: Address, encode: impl FnOnce(&Channel) -> Result<Message> + Send + 'static) -> Self {
        self.0.push((address, Box::new(encode)));
        self
    }

    pub(crate) fn extend(&mut self, more: Self) {
        self.0.extend(more.0);
    }

    /// Encoded, each with an id that stays the same however often it is tried.
    pub(crate) fn messages(self, bus: &Bus) -> Result<Vec<(Channel, Message)>> {
        let one = |(address, encode): (Address, Encode)| {
            let channel = bus.channel(address);
            let mut message = encode(&channel)?;
            message.stamp(crate::message::Stamp::now);
            Ok((channel, message))
        };
        self.0.into_iter().map(one).collect()
    }
}

impl fmt::Debug for Sends {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(address, _)| address)).finish()
    }
}

impl IntoOutcome for Sends {
    fn into_outcome(self) -> Outcome {
        Outcome::Send(self)
    }
}
