//! A group of a topic that takes only some kinds, where the broker delivers all of them.

use crate::{Consumer, Incoming, sieve::Sieve};

/// The consumer itself when there is nothing to filter; otherwise it acknowledges, unseen, what is of another kind.
pub(crate) fn filtered(consumer: Box<dyn Consumer>, kinds: &[String]) -> Box<dyn Consumer> {
    if kinds.is_empty() {
        return consumer;
    }
    let (settler, kinds) = (consumer.settler(), kinds.to_vec());
    Box::new(Sieve::new(consumer, move |incoming: Incoming| {
        if incoming.message.kind().is_some_and(|kind| kinds.iter().any(|wanted| wanted == kind)) {
            return Some(incoming);
        }
        if let Some(Err(error)) = settler.ack(incoming.token).try_take() {
            // It comes again, and is passed over again.
            tracing::debug!(%error, "a message of another kind was not acknowledged");
        }
        None
    }))
}
