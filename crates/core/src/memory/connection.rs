use std::{
    fmt,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use tokio::time::{Instant, timeout_at};

use super::{
    NAME,
    channel::Channel,
    config::{Config, Limits},
    consumer::MemoryConsumer,
    producer::MemoryProducer,
    settle::Share,
    space::{Space, lock},
};
use crate::{
    Address, Backend, Capabilities, ChannelKind, Connection, ConsumeOptions, Consumer, Error, ErrorKind,
    HealthReporter, HealthWatch, Listed, Message, ProduceOptions, Producer, Result, Start, Stats,
};

/// How long closing waits for sends that wait for room; without a bound, a full queue that nobody reads would
/// keep the process from ending.
const FLUSH_FOR: Duration = Duration::from_secs(5);

pub(super) struct MemoryConnection {
    space: Arc<Space>,
    limits: Limits,
    capabilities: Capabilities,
    max_payload: usize,
    /// The backend that it is as strict as.
    model: Option<Arc<dyn Backend>>,
    link: Arc<Link>,
}

/// What a connection shares with its producers and consumers.
pub(super) struct Link {
    id: u64,
    closed: AtomicBool,
    health: HealthReporter,
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    channels: Vec<Weak<Channel>>,
    shares: Vec<Weak<Share>>,
}

impl Link {
    fn new() -> Self {
        static IDS: AtomicU64 = AtomicU64::new(0);
        let health = HealthReporter::new();
        health.up();
        Self { id: IDS.fetch_add(1, Ordering::Relaxed), closed: AtomicBool::new(false), health, open: Mutex::default() }
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    fn add_channel(&self, channel: &Arc<Channel>) {
        let mut open = lock(&self.open);
        open.channels.retain(|known| known.strong_count() > 0 && !std::ptr::eq(known.as_ptr(), Arc::as_ptr(channel)));
        open.channels.push(Arc::downgrade(channel));
    }

    fn add_share(&self, share: &Arc<Share>) {
        let mut open = lock(&self.open);
        open.shares.retain(|known| known.strong_count() > 0);
        open.shares.push(Arc::downgrade(share));
        drop(open);
        if self.is_closed() {
            share.close();
        }
    }
}

impl MemoryConnection {
    pub(super) fn new(config: &Config) -> Self {
        let capabilities = config.capabilities();
        Self {
            space: Space::named(config.space()),
            limits: config.limits(),
            max_payload: capabilities.max_payload.unwrap_or(usize::MAX),
            capabilities,
            model: config.model().cloned(),
            link: Arc::new(Link::new()),
        }
    }

    fn check_open(&self, operation: &'static str) -> Result<()> {
        if self.link.is_closed() { Err(Error::closed(operation).with_backend(NAME)) } else { Ok(()) }
    }

    /// Whether what this stands for, or memory itself, can do that.
    fn allows(can: bool, what: &'static str) -> Result<()> {
        if can { Ok(()) } else { Err(Error::unsupported(NAME, what)) }
    }

    fn channel(&self, address: &Address, operation: &'static str, declare: bool) -> Result<Arc<Channel>> {
        self.check_open(operation)?;
        if declare {
            return Ok(self.space.declare(address, self.limits));
        }
        self.space.find(address).ok_or_else(|| Channel::new(address.clone()).missing(operation))
    }

    /// The channel of a consumer, with its group and dead letters when it is to be declared.
    fn topology(&self, address: &Address, options: &ConsumeOptions, declare: bool) -> Result<Arc<Channel>> {
        check_extra(&options.extra, "consume")?;
        if options.start == Start::Earliest && address.kind() == ChannelKind::Topic {
            return Err(Error::unsupported(NAME, "replaying a topic from its beginning")
                .with_channel(address.name())
                .with_hint("start with new messages, or declare the group before they are sent"));
        }
        let channel = self.channel(address, "consume", declare)?;
        if declare {
            if let (ChannelKind::Topic, Some(group)) = (address.kind(), &options.group) {
                channel.declare_group(group);
            }
            if let Some(dead_letters) = &options.dead_letters {
                self.space.declare(dead_letters, self.limits);
            }
        }
        Ok(channel)
    }
}

/// There is no option that only this backend knows.
fn check_extra(extra: &[(String, String)], operation: &'static str) -> Result<()> {
    let Some((name, _)) = extra.first() else { return Ok(()) };
    Err(Error::new(ErrorKind::InvalidInput, format!("unknown option {name:?}; this backend has none of its own"))
        .with_backend(NAME)
        .with_operation(operation)
        .with_hint("remove it, or select the backend that it is for"))
}

#[async_trait]
impl Connection for MemoryConnection {
    fn backend(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn health(&self) -> HealthWatch {
        self.link.health.watch()
    }

    fn check_address(&self, address: &Address) -> Result<()> {
        self.model.as_ref().map_or(Ok(()), |model| model.check_address(address))
    }

    async fn producer(&self, address: &Address, options: &ProduceOptions) -> Result<Box<dyn Producer>> {
        check_extra(&options.extra, "produce")?;
        let channel = self.channel(address, "produce", options.declare)?;
        self.link.add_channel(&channel);
        Ok(Box::new(MemoryProducer::new(channel, Arc::clone(&self.link), self.max_payload)))
    }

    async fn consumer(&self, address: &Address, options: &ConsumeOptions) -> Result<Box<dyn Consumer>> {
        let channel = self.topology(address, options, options.declare)?;
        let queue = channel.queue(options.group.as_deref())?;
        let share = Arc::new(Share::new(Arc::clone(&channel), queue, options));
        channel.attach(&share)?;
        self.link.add_share(&share);
        Ok(Box::new(MemoryConsumer::new(share, Arc::clone(&self.link))))
    }

    async fn declare(&self, address: &Address, options: &ConsumeOptions) -> Result<()> {
        self.topology(address, options, true).map(drop)
    }

    async fn delete(&self, address: &Address, group: Option<&str>) -> Result<()> {
        self.check_open("delete")?;
        match group.filter(|_| address.kind() == ChannelKind::Topic) {
            None => self.space.delete(address),
            Some(group) => {
                if let Some(channel) = self.space.find(address) {
                    channel.delete_group(group);
                }
            }
        }
        Ok(())
    }

    async fn exists(&self, address: &Address, group: Option<&str>) -> Result<bool> {
        self.check_open("exists")?;
        Self::allows(self.capabilities.lookup, "looking whether a channel exists")?;
        let found = self.space.find(address);
        Ok(found.is_some_and(|channel| group.is_none_or(|group| channel.has_group(group))))
    }

    async fn list(&self) -> Result<Vec<Listed>> {
        self.check_open("list")?;
        Self::allows(self.capabilities.list, "listing channels")?;
        let mut listed = Vec::new();
        for channel in self.space.all() {
            let address = channel.address();
            let groups = channel.groups();
            // One that is deleted at this moment is not there any more.
            let counted = |group: Option<&str>| channel.stats(group).ok();
            if let Some(stats) = counted(None) {
                listed.push(Listed { address: address.clone(), group: None, stats: Some(stats) });
            }
            listed.extend(groups.into_iter().filter_map(|group| {
                let stats = Some(counted(Some(&group))?);
                Some(Listed { address: address.clone(), group: Some(group), stats })
            }));
        }
        Ok(listed)
    }

    async fn bind(&self, queue: &Address, topic: &Address) -> Result<()> {
        Self::allows(self.capabilities.bindings, "binding a queue to a topic")?;
        let (queue, topic) = (self.channel(queue, "bind", true)?, self.channel(topic, "bind", true)?);
        topic.bind(&queue);
        Ok(())
    }

    async fn unbind(&self, queue: &Address, topic: &Address) -> Result<()> {
        self.check_open("unbind")?;
        Self::allows(self.capabilities.bindings, "binding a queue to a topic")?;
        if let Some(topic) = self.space.find(topic) {
            topic.unbind(queue);
        }
        Ok(())
    }

    async fn peek(&self, address: &Address, group: Option<&str>, max: usize) -> Result<Vec<Message>> {
        Self::allows(self.capabilities.peek, "looking at messages without taking them")?;
        self.channel(address, "peek", false)?.peek(group, max)
    }

    async fn stats(&self, address: &Address, group: Option<&str>) -> Result<Stats> {
        Self::allows(self.capabilities.stats, "counting the messages of a channel")?;
        self.channel(address, "stats", false)?.stats(group)
    }

    async fn purge(&self, address: &Address) -> Result<u64> {
        Self::allows(self.capabilities.purge && address.kind() == ChannelKind::Queue, "emptying this channel")?;
        self.channel(address, "purge", false)?.purge()
    }

    async fn ping(&self) -> Result<()> {
        self.check_open("ping")
    }

    async fn close(&self) -> Result<()> {
        if self.link.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        let channels: Vec<Arc<Channel>> = lock(&self.link.open).channels.iter().filter_map(Weak::upgrade).collect();
        let deadline = Instant::now() + FLUSH_FOR;
        for channel in &channels {
            if let Some(flushed) = channel.flush(self.link.id) {
                // What is late or gone is given up below.
                let _ = timeout_at(deadline, flushed).await;
            }
            channel.abandon(self.link.id);
        }
        let shares: Vec<Arc<Share>> = lock(&self.link.open).shares.iter().filter_map(Weak::upgrade).collect();
        shares.iter().for_each(|share| share.close());
        self.link.health.closed("closed by the program");
        Ok(())
    }
}

impl fmt::Debug for MemoryConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryConnection").field("closed", &self.link.is_closed()).finish_non_exhaustive()
    }
}
