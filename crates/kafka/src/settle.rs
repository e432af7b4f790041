//! Settling: finished messages are noted and committed soon; a retry is a copy, for now or for later.

use std::{sync::Arc, time::Duration};

use polymq_core::{ATTEMPT, Completion, Error, Message, Settler, Token, now};

use crate::{
    NAME,
    hub::Hub,
    publisher::{Answer, Outgoing, Publisher},
    topology::{self, MAX_DELAY},
};

/// Settles what one hub has delivered.
#[derive(Debug)]
pub(crate) struct KafkaSettler {
    hub: Arc<Hub>,
    publisher: Arc<Publisher>,
}

impl KafkaSettler {
    pub(crate) fn new(hub: Arc<Hub>, publisher: Arc<Publisher>) -> Self {
        Self { hub, publisher }
    }

    fn locate(&self, error: Error) -> Error {
        error.with_channel(&*self.hub.names.topic)
    }

    fn copy(&self, token: Token, message: &Message, attempt: u32, after: Duration) -> Result<Completion<()>, Error> {
        if after > MAX_DELAY {
            return Err(Error::unsupported(NAME, format_args!("a delay of more than {MAX_DELAY:?}")));
        }
        let Some(delay) = &self.hub.names.delay else {
            // Nobody else has this subscription, so nobody else can have the message next.
            return self.hub.hold(token, message, attempt, after).map(|()| Completion::ready(Ok(())));
        };
        // A delivery that is another's already must have no second successor.
        self.hub.check(token)?;
        let mut copy = message.clone().without_deliver_at();
        copy.set_system_header(ATTEMPT, attempt.to_string());
        let (completer, completion) = Completion::queued();
        let answer = Answer::Retry { completer, hub: Arc::clone(&self.hub), token };
        // A topic itself has other groups, to which the message is not new.
        let at_once = after.is_zero() && self.hub.names.is_queue;
        let (topic, partition, due) = match at_once {
            true => (&self.hub.names.topic, None, None),
            false => (delay, Some(topology::tier(after)), Some(now() + after)),
        };
        self.publisher.send(Outgoing { message: copy, topic: Arc::clone(topic), partition, due, answer });
        Ok(completion)
    }
}

impl Settler for KafkaSettler {
    fn ack(&self, token: Token) -> Completion<()> {
        Completion::ready(self.hub.ack(token).map_err(|error| self.locate(error)))
    }

    fn release(&self, token: Token, message: Message) {
        self.hub.release(token, message);
    }

    fn retry(&self, token: Token, message: &Message, attempt: u32, after: Duration) -> Completion<()> {
        match self.copy(token, message, attempt, after) {
            Ok(completion) => completion,
            Err(error) => Completion::ready(Err(self.locate(error.with_operation("retry")))),
        }
    }
}
