//! What there is and how much of it waits, asked of the broker.

use std::{sync::Arc, time::Duration};

use polymq_core::{Address, Error, Result, Stats};
use rdkafka::{Offset, consumer::Consumer as _};

use crate::{
    NAME, client,
    config::KafkaConfig,
    connection::KafkaConnection,
    context::{Context, Native},
    convert::legible,
    error,
    link::{Link, lock},
    partition,
    publisher::{self, configuration},
    topology,
};

impl KafkaConnection {
    pub(crate) async fn is_there(&self, address: &Address, group: Option<&str>) -> Result<bool> {
        let names = self.names(address, group)?;
        let located = |error: Error| error.with_channel(address.name());
        let found = self.blocking("exists", move |native, config, link| {
            let timeout = config.connect_timeout;
            let Some(partitions) = topology::partitions(publisher::inner(native), &names.topic, timeout)? else {
                return Ok(false);
            };
            let Some(group) = names.group.as_ref().filter(|_| !names.is_queue) else { return Ok(true) };
            // A group's share begins with its first position.
            let asked = asking(config, link, group)?;
            let positions = positions(&asked, &names.topic, &partitions, timeout)?;
            Ok(positions.iter().any(|(_, _, _, (position, _))| position.is_some()))
        });
        found.await.map_err(located)
    }

    pub(crate) async fn count(&self, address: &Address, group: Option<&str>) -> Result<Stats> {
        let names = self.names(address, group)?;
        let Some(group) = names.group.clone() else {
            return Err(Error::unsupported(NAME, "counting the messages of a topic without a group")
                .with_hint("name the group"));
        };
        let hub = lock(&self.hubs).groups.get(&names).cloned();
        let counted = self.blocking("stats", move |native, config, link| {
            let timeout = config.connect_timeout;
            let client = publisher::inner(native);
            let partitions = topology::existing(client, &names.topic, timeout)?;
            let here = hub.as_ref().and_then(|hub| hub.native());
            let (members_here, consumers_here) = match (&here, &hub) {
                (Some(_), Some(hub)) => (1, hub.consumers()),
                _ => (0, 0),
            };
            let asked = match here {
                Some(native) => native,
                None => Arc::new(asking(config, link, &group)?),
            };
            let mut ready = 0;
            for (partition, low, high, committed) in positions(&asked, &names.topic, &partitions, timeout)? {
                let ours = hub.as_ref().and_then(|hub| hub.waiting(partition, high));
                ready += ours.unwrap_or_else(|| waiting(low, high, &committed));
            }
            let groups = client.fetch_group_list(Some(&group), timeout);
            let groups = groups.map_err(|error| error::native("stats", error))?;
            let members: usize = groups.groups().iter().map(|group| group.members().len()).sum();
            let consumers = members.saturating_sub(members_here) + consumers_here;
            let unsettled = hub.filter(|_| members <= members_here).map(|hub| hub.unsettled() as u64);
            Ok(Stats { ready, unsettled, consumers: consumers as u64 })
        });
        counted.await.map_err(|error| error.with_channel(address.name()))
    }
}

/// A client that asks about a group and is no member of it. Blocks.
pub(crate) fn asking(config: &Arc<KafkaConfig>, link: &Arc<Link>, group: &str) -> Result<Native> {
    let made = Context::asking(link, config)
        .and_then(|context| client::consumer(config, group, 1, 1)?.create_with_context(context).map_err(configuration));
    made.map_err(error::for_now)
}

pub(crate) type Committed = (Option<i64>, String);

/// Partition, first offset, end, and what is committed. Blocks.
pub(crate) fn positions(
    native: &Native,
    topic: &str,
    partitions: &[i32],
    timeout: Duration,
) -> Result<Vec<(i32, i64, i64, Committed)>> {
    let failed = |error| error::native("stats", error).with_channel(topic);
    let committed = native.committed_offsets(topology::list(topic, partitions), timeout).map_err(failed)?;
    let one = |partition: &i32| {
        let (low, high) = native.fetch_watermarks(topic, *partition, timeout).map_err(failed)?;
        let found = committed.find_partition(topic, *partition);
        let found = found.map(|found| match found.offset() {
            Offset::Offset(offset) => (Some(offset), legible(|| found.metadata().to_owned()).unwrap_or_default()),
            _ => (None, String::new()),
        });
        Ok((*partition, low, high, found.unwrap_or_default()))
    };
    partitions.iter().map(one).collect()
}

pub(crate) fn waiting(low: i64, high: i64, (position, metadata): &Committed) -> u64 {
    match position {
        Some(position) if *position >= low => partition::unfinished(*position, metadata, high),
        _ => u64::try_from(high - low).unwrap_or(0),
    }
}
