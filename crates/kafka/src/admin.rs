//! What changes topics: making, deleting and emptying them.

use std::sync::Arc;

use polymq_core::{Address, ChannelKind, ConsumeOptions, Error, Result};
use rdkafka::{Offset, TopicPartitionList, admin::AdminClient, client::DefaultClientContext};

use crate::{
    config::Declare,
    connection::KafkaConnection,
    error,
    publisher::{self, configuration},
    stats,
    topology::{self, Names, Wanted},
};

/// A client that administers, for one use.
struct Admin(Option<AdminClient<DefaultClientContext>>);

impl Admin {
    fn client(&self) -> Result<&AdminClient<DefaultClientContext>> {
        self.0.as_ref().ok_or_else(|| error::closed("declare"))
    }
}

impl Drop for Admin {
    fn drop(&mut self) {
        // Waits for a thread of its own, which is nothing to do in async code.
        let client = self.0.take();
        std::thread::spawn(move || drop(client));
    }
}

impl KafkaConnection {
    /// A client that administers. It is needed rarely, so it has no connection for longer.
    fn admin(&self) -> Result<Admin> {
        let made = self.native_config().and_then(|config| config.create().map_err(configuration));
        made.map(|client| Admin(Some(client))).map_err(error::for_now)
    }

    /// Makes sure that these topics exist, or makes them. What is temporary is nobody's but this process's, and made
    /// whatever the settings say of topics.
    pub(crate) async fn ensure(&self, wanted: Vec<Wanted>, declare: bool, temporary: bool) -> Result<()> {
        let declare = declare && (temporary || self.config.declare == Declare::Auto);
        let missing = self
            .blocking("declare", move |native, config, _| {
                let client = publisher::inner(native);
                let mut missing = Vec::new();
                for wanted in wanted {
                    match topology::partitions(client, &wanted.name, config.connect_timeout)? {
                        Some(_) => {}
                        None if declare => missing.push(wanted),
                        // Without its delay topic a channel can be used all the same, but for delays.
                        None if wanted.is_delay => {}
                        None => return Err(topology::not_found(&wanted.name)),
                    }
                }
                Ok(missing)
            })
            .await?;
        if missing.is_empty() {
            return Ok(());
        }
        topology::create(self.admin()?.client()?, &self.config, &missing).await?;
        self.blocking("declare", move |native, config, _| {
            let names: Vec<&str> = missing.iter().map(|wanted| &*wanted.name).collect();
            topology::await_existence(publisher::inner(native), &names, true, config.connect_timeout)
        })
        .await
    }

    pub(crate) async fn declare_all(&self, names: &Names, options: &ConsumeOptions) -> Result<()> {
        let mut wanted = Wanted::of(names);
        if let Some(letters) = options.dead_letters.as_ref().filter(|_| !options.temporary) {
            let letters = Names::of(letters, None);
            letters.check()?;
            // Made by us only: without `declare` nobody says that dead letters are needed.
            if options.declare {
                wanted.extend(Wanted::of(&letters));
            }
        }
        self.ensure(wanted, options.declare, options.temporary).await
    }

    pub(crate) async fn delete_topics(&self, address: &Address, group: Option<&str>) -> Result<()> {
        let names = self.names(address, group)?;
        let located = |error: Error| error.with_channel(address.name()).with_operation("delete");
        if let Some(error) = self.link.down_error("delete") {
            return Err(error);
        }
        let whole = address.kind() == ChannelKind::Queue || group.is_none();
        let main = whole.then_some(&*names.topic);
        let topics: Vec<&str> = main.into_iter().chain(names.delay.as_deref()).collect();
        let admin = self.admin()?;
        topology::delete(admin.client()?, &self.config, &topics).await.map_err(located)?;
        if let Some(group) = &names.group {
            // A group that has consumers, or is none, keeps what it has: positions of topics that are gone.
            let _ = admin.client()?.delete_groups(&[&**group], &topology::options(&self.config)).await;
        }
        let topics: Vec<Arc<str>> = topics.into_iter().map(Arc::from).collect();
        let gone = self.blocking("delete", move |native, config, _| {
            let topics: Vec<&str> = topics.iter().map(|topic| &**topic).collect();
            topology::await_existence(publisher::inner(native), &topics, false, config.connect_timeout)
        });
        gone.await.map_err(located)
    }

    pub(crate) async fn purge_topic(&self, address: &Address) -> Result<u64> {
        let names = self.names(address, None)?;
        let group = names.group.clone().unwrap_or_else(|| Arc::clone(&names.topic));
        let located = |error: Error| error.with_channel(address.name()).with_operation("purge");
        let counted = self.blocking("purge", move |native, config, link| {
            let timeout = config.connect_timeout;
            let partitions = topology::existing(publisher::inner(native), &names.topic, timeout)?;
            let asked = stats::asking(config, link, &group)?;
            let mut list = TopicPartitionList::new();
            let mut count = 0;
            for (partition, low, high, committed) in stats::positions(&asked, &names.topic, &partitions, timeout)? {
                count += stats::waiting(low, high, &committed);
                let added = list.add_partition_offset(&names.topic, partition, Offset::Offset(high));
                added.map_err(|error| error::native("purge", error))?;
            }
            Ok((list, count))
        });
        let (list, count) = counted.await.map_err(located)?;
        let options = topology::options(&self.config);
        let admin = self.admin()?;
        let purged = admin.client()?.delete_records(&list, &options).await;
        let purged = purged.map_err(|error| located(error::native("purge", error)))?;
        for element in purged.elements() {
            element.error().map_err(|error| located(error::native("purge", error)))?;
        }
        Ok(count)
    }
}
