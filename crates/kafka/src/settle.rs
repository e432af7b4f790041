//! Settling: finished messages are noted and committed soon; a retry is a copy, for now or for later.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use polymq_core::{ATTEMPT, Address, Completion, Error, Message, Settler, Token};

use crate::{
    NAME,
    hub::Hub,
    publisher::{Answer, Outgoing, Publisher},
    topology::{self, MAX_DELAY},
    transactions::Sending,
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
        // A topic itself has other groups, to which the message is not new.
        let at_once = after.is_zero() && self.hub.names.is_queue;
        let (topic, partition, due) = match at_once {
            true => (&self.hub.names.topic, None, None),
            false => (delay, Some(topology::tier(after)), Some(Instant::now() + after)),
        };
        let topic = Arc::clone(topic);
        if let Some(transactions) = self.hub.transactions() {
            return Ok(transactions.settle(token, vec![Sending { topic, partition, due, message: copy }]));
        }
        let (completer, completion) = Completion::queued();
        let answer = Answer::Retry { completer, hub: Arc::clone(&self.hub), token };
        self.publisher.send(Outgoing { message: copy, topic, partition, due, answer });
        Ok(completion)
    }
}

impl Settler for KafkaSettler {
    fn ack(&self, token: Token) -> Completion<()> {
        self.ack_many(&[token])
    }

    fn ack_many(&self, tokens: &[Token]) -> Completion<()> {
        Completion::ready(self.hub.ack(tokens).map_err(|error| self.locate(error)))
    }

    fn ack_and_send(&self, token: Token, messages: Vec<(Address, Message)>) -> Completion<()> {
        let sends = messages.into_iter().map(|(address, message)| {
            Sending::to(&address, message).map_err(|error| error.with_operation("send").with_channel(address.name()))
        });
        match (self.hub.transactions(), sends.collect()) {
            (_, Err(error)) => Completion::ready(Err(error)),
            (Some(transactions), Ok(sends)) => transactions.settle(token, sends),
            (None, Ok(_)) => Completion::ready(Err(self.locate(Error::unsupported(
                NAME,
                "sending and acknowledging as one for a consumer that is not transactional",
            )))),
        }
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
