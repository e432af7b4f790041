//! What can be asked of queues and topics beside their messages: to be made, to exist, to be listed, looked into, emptied
//! and deleted.

use polymq_core::{Address, ChannelKind, Error, ErrorKind, Listed, Message, Result};

use crate::{
    NAME,
    config::Topics,
    error,
    link::{Link, Live},
    names,
    topology::{self, Pattern},
};

/// What a connection is asked.
#[derive(Clone, Copy)]
pub(crate) struct Admin<'a> {
    pub(crate) link: &'a Link,
    pub(crate) topics: Topics,
}

impl Admin<'_> {
    /// Makes a queue, or sees that it is there.
    pub(crate) async fn ensure_queue(&self, operation: &'static str, queue: &str, declare: bool) -> Result<()> {
        let live = self.link.live_soon(operation).await?;
        match topology::queue_exists(self.link, &live, queue).await {
            Ok(true) => return Ok(()),
            Ok(false) if !declare => return Err(error::not_found(operation, format_args!("the queue {queue:?}"))),
            Ok(false) => {}
            // An older server does not tell what there is.
            Err(error) if declare && error.kind() == ErrorKind::Unsupported => {}
            Err(error) => return Err(error),
        }
        match topology::create(self.link, &live, Pattern::Queues, queue).await {
            // It is made when it is used.
            Err(error) if error.kind() == ErrorKind::Unsupported => Ok(()),
            made => made,
        }
    }

    /// Makes a topic, or sees that it is there. What is not kept needs not be made.
    pub(crate) async fn ensure_topic(&self, operation: &'static str, topic: &str, declare: bool) -> Result<()> {
        if self.topics == Topics::Events {
            return Ok(());
        }
        let live = self.link.live_soon(operation).await?;
        let found = match declare {
            true => topology::create(self.link, &live, Pattern::EventsStore, topic).await.map(|()| true),
            false => topology::exists(self.link, &live, Pattern::EventsStore, topic).await,
        };
        match found {
            Ok(true) => Ok(()),
            Ok(false) => Err(error::not_found(operation, format_args!("the topic {topic:?}"))),
            // It is made when it is used.
            Err(error) if declare && error.kind() == ErrorKind::Unsupported => Ok(()),
            Err(error) => Err(error),
        }
    }

    pub(crate) async fn delete(&self, address: &Address, group: Option<&str>) -> Result<()> {
        let live = self.link.live_soon("delete").await?;
        let name = address.name();
        match (address.kind(), group, self.topics) {
            (ChannelKind::Queue, ..) => topology::delete(self.link, &live, Pattern::Queues, name).await,
            (ChannelKind::Topic, _, Topics::Events) => Ok(()),
            (ChannelKind::Topic, Some(group), _) => self.delete_group(&live, name, group).await,
            (ChannelKind::Topic, None, _) => {
                for group in self.groups(&live, name).await? {
                    self.delete_group(&live, name, &group).await?;
                }
                topology::delete(self.link, &live, Pattern::EventsStore, name).await
            }
        }
    }

    pub(crate) async fn exists(&self, address: &Address, group: Option<&str>) -> Result<bool> {
        let live = self.link.live_soon("exists").await?;
        let name = address.name();
        match (address.kind(), group, self.topics) {
            (ChannelKind::Queue, ..) => topology::queue_exists(self.link, &live, name).await,
            // What is not kept needs not be made: it is there for whoever names it.
            (ChannelKind::Topic, _, Topics::Events) => Ok(true),
            (ChannelKind::Topic, Some(group), _) => {
                topology::queue_exists(self.link, &live, &names::of_position(name, group)).await
            }
            (ChannelKind::Topic, None, _) => topology::exists(self.link, &live, Pattern::EventsStore, name).await,
        }
    }

    pub(crate) async fn list(&self) -> Result<Vec<Listed>> {
        let live = self.link.live_soon("list").await?;
        let kept = self.topics == Topics::Store;
        let mut listed = Vec::new();
        for queue in topology::list(self.link, &live, Pattern::Queues, "").await? {
            if let Some((address, group)) = names::of_queue(&queue.name).filter(|(_, group)| kept || group.is_none()) {
                listed.push(Listed { address, group, stats: None });
            }
        }
        let of_topics = if kept { Pattern::EventsStore } else { Pattern::Events };
        for topic in topology::list(self.link, &live, of_topics, "").await? {
            // Patterns that somebody listens to are no topics.
            if names::is_topic(&topic.name) && !topic.name.contains(['*', '>']) {
                listed.push(Listed { address: Address::topic(topic.name), group: None, stats: None });
            }
        }
        Ok(listed)
    }

    pub(crate) async fn peek(&self, address: &Address, group: Option<&str>, max: usize) -> Result<Vec<Message>> {
        let queue = self.queue_of(address, group)?;
        self.ensure_queue("peek", &queue, false).await?;
        let live = self.link.live_soon("peek").await?;
        topology::peek(self.link, &live, &queue, max).await
    }

    pub(crate) async fn purge(&self, queue: &str) -> Result<u64> {
        self.ensure_queue("purge", queue, false).await?;
        let live = self.link.live_soon("purge").await?;
        topology::purge(self.link, &live, queue).await
    }

    /// The groups of a topic.
    async fn groups(&self, live: &Live, topic: &str) -> Result<Vec<String>> {
        let queues = topology::list(self.link, live, Pattern::Queues, topic).await?;
        let of_topic = |queue: topology::ChannelInfo| {
            let (address, group) = names::of_queue(&queue.name)?;
            group.filter(|_| address == Address::topic(topic))
        };
        Ok(queues.into_iter().filter_map(of_topic).collect())
    }

    async fn delete_group(&self, live: &Live, topic: &str, group: &str) -> Result<()> {
        let (queue, position) = (names::of_group(topic, group), names::of_position(topic, group));
        topology::delete(self.link, live, Pattern::Queues, &position).await?;
        topology::delete(self.link, live, Pattern::Queues, &queue).await?;
        topology::delete(self.link, live, Pattern::EventsStore, &position).await
    }

    /// The queue that holds what an address, or a group's share of it, holds.
    fn queue_of(&self, address: &Address, group: Option<&str>) -> Result<String> {
        match (address.kind(), group, self.topics) {
            (ChannelKind::Queue, ..) => Ok(address.name().to_owned()),
            (ChannelKind::Topic, _, Topics::Events) => {
                Err(Error::unsupported(NAME, "looking into a topic that keeps nothing (topics=events)"))
            }
            (ChannelKind::Topic, Some(group), _) => Ok(names::of_group(address.name(), group)),
            (ChannelKind::Topic, None, _) => {
                Err(Error::unsupported(NAME, "looking into a topic without naming a group"))
            }
        }
    }
}
