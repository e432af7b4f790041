//! Receiving without handlers: the caller settles each delivery.

use std::{collections::VecDeque, mem, sync::Arc, time::Duration};

use futures_util::stream::{self, Stream};

use crate::{
    Address, Capabilities, Channel, ChannelKind, ConsumeOptions, Consumer, Delivery, Error, ErrorKind, Incoming, Order,
    Result, Start, bus::Parts, consumer::receive, delivery::Origin, filter::filtered,
};

/// The most messages that [`Subscription::next`] takes from the backend at once.
const AHEAD: usize = 128;

/// A live subscription. Messages are fetched ahead, at most the prefetch; it goes on by itself after a lost connection.
#[derive(Debug)]
pub struct Subscription {
    consumer: Box<dyn Consumer>,
    origin: Arc<Origin>,
    /// Fetched and not given out.
    buffer: VecDeque<Incoming>,
    /// What `receive` of the consumer fills, with the memory of the buffer when that is empty.
    received: Vec<Incoming>,
    closed: bool,
}

impl Subscription {
    pub(crate) async fn open(parts: Arc<Parts>, address: Address, options: ConsumeOptions) -> Result<Self> {
        let (consumer, origin) = open(&parts, address, &options).await?;
        Ok(Self { consumer, origin, buffer: VecDeque::new(), received: Vec::new(), closed: false })
    }

    /// Waits for the next message. Cancel-safe: dropping the future loses nothing.
    ///
    /// # Errors
    /// Final ones only: [`ErrorKind::Closed`], [`ErrorKind::NotFound`] when the channel was deleted. A lost
    /// connection is waited out.
    pub async fn next(&mut self) -> Result<Delivery> {
        loop {
            if let Some(incoming) = self.buffer.pop_front() {
                return Ok(Delivery::new(incoming, Arc::clone(&self.origin)));
            }
            self.fill(AHEAD).await?;
        }
    }

    /// Waits up to `wait` for a message and returns what is there, at most `max`; empty when there was none.
    ///
    /// # Errors
    /// As [`next`](Self::next).
    pub async fn receive(&mut self, max: usize, wait: Duration) -> Result<Vec<Delivery>> {
        if self.buffer.is_empty() {
            match tokio::time::timeout(wait, self.fill(max)).await {
                Ok(result) => result?,
                Err(_) => return Ok(Vec::new()),
            }
        }
        let count = self.buffer.len().min(max);
        let origin = &self.origin;
        Ok(self.buffer.drain(..count).map(|incoming| Delivery::new(incoming, Arc::clone(origin))).collect())
    }

    /// Messages without end, across reconnects; ends with the first error.
    pub fn stream(self) -> impl Stream<Item = Result<Delivery>> + Send {
        stream::unfold(Some(self), |subscription| async {
            let mut subscription = subscription?;
            match subscription.next().await {
                Ok(delivery) => Some((Ok(delivery), Some(subscription))),
                Err(error) => Some((Err(error), None)),
            }
        })
    }

    /// Stops fetching and returns to the broker what was fetched and not received. Deliveries that were received
    /// can still be settled. A second call does nothing.
    ///
    /// # Errors
    /// As the broker answers.
    pub async fn close(&mut self) -> Result<()> {
        self.closed = true;
        self.release();
        self.consumer.close().await.map_err(|error| locate(error, &self.origin))
    }

    async fn fill(&mut self, max: usize) -> Result<()> {
        if self.closed {
            return Err(locate(Error::closed("receive"), &self.origin));
        }
        // Cancel-safe: what a cancelled call has appended stays in `received`.
        if self.received.is_empty() {
            if self.buffer.is_empty() && self.received.capacity() == 0 {
                self.received = mem::take(&mut self.buffer).into();
            }
            receive(&mut *self.consumer, max, &mut self.received).await.map_err(|error| locate(error, &self.origin))?;
        }
        if self.buffer.is_empty() {
            self.buffer = mem::take(&mut self.received).into();
        } else {
            self.buffer.extend(self.received.drain(..));
        }
        Ok(())
    }

    fn release(&mut self) {
        for incoming in self.buffer.drain(..).chain(self.received.drain(..)) {
            self.origin.settler.release(incoming.token, incoming.message);
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.release();
    }
}

/// Opens a consumer after its options were checked, with what its deliveries share.
pub(crate) async fn open(
    parts: &Arc<Parts>,
    address: Address,
    options: &ConsumeOptions,
) -> Result<(Box<dyn Consumer>, Arc<Origin>)> {
    let connection = &parts.connection;
    let consumer = connection.consumer(&address, options).await.map_err(|error| {
        error.with_backend(connection.backend()).with_operation("consume").with_channel(address.name())
    })?;
    // A broker that filters leaves nothing to do here; a filter of an earlier consumer may still be in force there.
    let consumer = filtered(consumer, &options.kinds);
    let origin = Origin {
        settler: consumer.settler(),
        group: options.group.clone(),
        backend: connection.backend(),
        capabilities: parts.capabilities.clone(),
        transactional: options.transactional,
        dead_letters: options.dead_letters.clone().map(|queue| Channel::new(Arc::clone(parts), queue)),
        address,
    };
    Ok((consumer, Arc::new(origin)))
}

/// Refuses, before anything is done, what the backend declares that it cannot do.
pub(crate) fn check_options(
    backend: &'static str,
    capabilities: &Capabilities,
    address: &Address,
    options: &ConsumeOptions,
) -> Result<()> {
    let refuse =
        |what: &str| Err(Error::unsupported(backend, what).with_operation("consume").with_channel(address.name()));
    if options.prefetch == 0 || options.prefetch_bytes == 0 {
        return Err(Error::new(ErrorKind::InvalidInput, "a prefetch of 0 would never receive anything")
            .with_operation("consume")
            .with_channel(address.name())
            .with_hint("use at least 1"));
    }
    match address.kind() {
        ChannelKind::Queue if !capabilities.queues => return refuse("queues"),
        ChannelKind::Topic if !capabilities.topics => return refuse("topics"),
        ChannelKind::Queue if options.group.is_some() => {
            return Err(Error::new(ErrorKind::InvalidInput, "a queue has no groups: its consumers share the messages")
                .with_operation("consume")
                .with_channel(address.name())
                .with_hint("use a topic"));
        }
        ChannelKind::Topic if options.group.is_some() && !capabilities.groups => return refuse("groups of a topic"),
        _ => {}
    }
    if options.start == Start::Earliest && !capabilities.replay {
        return refuse("starting with messages from before the group existed");
    }
    if options.transactional && !capabilities.transactions {
        return refuse("sending and acknowledging as one");
    }
    if options.ordered_by_key && capabilities.order == Order::None {
        return refuse("order by key");
    }
    if !options.kinds.is_empty() && address.kind() == ChannelKind::Queue {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "a queue is not filtered: what this consumer did not want, nobody would get",
        )
        .with_operation("consume")
        .with_channel(address.name())
        .with_hint("filter a group of a topic, or handle each kind with a handler of its own"));
    }
    if !options.kinds.is_empty() && !capabilities.filter.is_available() {
        return refuse("taking only some kinds of a topic");
    }
    check_dead_letters(address, options)?;
    Ok(())
}

/// Refuses a place for dead letters that is the channel itself, or keeps nothing.
pub(crate) fn check_dead_letters(address: &Address, options: &ConsumeOptions) -> Result<()> {
    let problem = match &options.dead_letters {
        Some(letters) if letters == address => "the dead-letter queue is the channel itself; dead letters would loop",
        Some(letters) if letters.kind() != ChannelKind::Queue => {
            "the place for dead letters is a topic, which keeps nothing for who comes later"
        }
        _ => return Ok(()),
    };
    Err(Error::new(ErrorKind::Config, problem).with_channel(address.name()).with_hint("name another queue"))
}

fn locate(error: Error, origin: &Origin) -> Error {
    error.with_backend(origin.backend).with_operation("receive").with_channel(origin.address.name())
}
