//! Mutants that make, find, bind, name and look into channels wrongly.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use polymq_core::{
    Address, Backend, Completion, Connection, ConsumeOptions, ErrorKind, Incoming, Listed, Message, Receipt, Result,
    Settings,
};

use super::{Mutant, mutant};
use crate::{
    cx::lock,
    twist::{Receiving, Sending, Twist},
};

pub(super) const MUTANTS: &[Mutant] = &[
    mutant("declares_anew", || Arc::new(DeclaresAnew), &["A1_declaring_is_harmless"]),
    mutant(
        "looks_by_making",
        || Arc::new(LooksByMaking),
        &["A1_looking_creates_nothing", "A8_topology_is_planned_and_made"],
    ),
    mutant("takes_no_for_missing", || Arc::new(TakesNoForMissing), &["A2_not_allowed_is_not_missing"]),
    mutant("binds_to_the_last_topic", || Arc::new(BindsToTheLast::default()), &["A3_bindings_add_up"]),
    mutant("mixes_kinds_up", || Arc::new(MixesKindsUp), &["A4_kinds_are_filtered"]),
    mutant("drops_what_has_failed", || Arc::new(DropsWhatHasFailed), &["A5_dead_letter_after_so_many"]),
    mutant("forgets_prefixes", || Arc::new(ForgetsPrefixes), &["A9_prefixes_separate"]),
    mutant("lists_nothing", || Arc::new(ListsNothing), &["A10_channels_are_listed"]),
    mutant("refuses_ordinary_names", || Arc::new(RefusesOrdinaryNames), &["A11_bad_names_are_refused"]),
    mutant("takes_what_it_peeks", || Arc::new(TakesWhatItPeeks), &["A15_peeking_takes_nothing"]),
    mutant("asks_without_end", || Arc::new(AsksWithoutEnd), &["A16_silence_ends_every_operation"]),
];

#[derive(Debug)]
struct DeclaresAnew;

#[async_trait]
impl Twist for DeclaresAnew {
    async fn declare(&self, connection: &dyn Connection, address: &Address, options: &ConsumeOptions) -> Result<()> {
        connection.delete(address, options.group.as_deref()).await?;
        connection.declare(address, options).await
    }
}

#[derive(Debug)]
struct LooksByMaking;

#[async_trait]
impl Twist for LooksByMaking {
    async fn exists(&self, connection: &dyn Connection, address: &Address, group: Option<&str>) -> Result<bool> {
        let options = ConsumeOptions { group: group.map(str::to_owned), ..ConsumeOptions::default() };
        let found = connection.exists(address, group).await?;
        connection.declare(address, &options).await?;
        Ok(found)
    }
}

#[derive(Debug)]
struct TakesNoForMissing;

#[async_trait]
impl Twist for TakesNoForMissing {
    async fn connect(&self, backend: &dyn Backend, settings: &Settings) -> Result<Arc<dyn Connection>> {
        backend.connect(settings).await.map_err(|error| error.with_kind(ErrorKind::NotFound))
    }

    async fn exists(&self, connection: &dyn Connection, address: &Address, group: Option<&str>) -> Result<bool> {
        Ok(connection.exists(address, group).await.unwrap_or(false))
    }
}

#[derive(Debug, Default)]
struct BindsToTheLast(Mutex<Option<Address>>);

#[async_trait]
impl Twist for BindsToTheLast {
    async fn bind(&self, connection: &dyn Connection, queue: &Address, topic: &Address) -> Result<()> {
        let earlier = lock(&self.0).replace(topic.clone());
        if let Some(earlier) = earlier {
            connection.unbind(queue, &earlier).await?;
        }
        connection.bind(queue, topic).await
    }
}

#[derive(Debug)]
struct MixesKindsUp;

#[async_trait]
impl Twist for MixesKindsUp {
    async fn receive(
        &self,
        _: &Receiving,
        consumer: &mut dyn polymq_core::Consumer,
        max: usize,
        into: &mut Vec<Incoming>,
    ) -> Result<()> {
        let outcome = consumer.receive(max, into).await;
        for incoming in into {
            incoming.message = std::mem::take(&mut incoming.message).with_kind("order.created");
        }
        outcome
    }
}

#[derive(Debug)]
struct DropsWhatHasFailed;

impl Twist for DropsWhatHasFailed {
    fn send(&self, at: &Sending, message: Message) -> Completion<Receipt> {
        if message.system_headers().get(polymq_core::dead_letter::REASON).is_none() {
            return at.producer.send(message);
        }
        let id = message.id().cloned().unwrap_or_default();
        Completion::ready(Ok(Receipt { id, broker_id: None }))
    }
}

#[derive(Debug)]
struct ForgetsPrefixes;

impl Twist for ForgetsPrefixes {
    fn address(&self, address: &Address) -> Address {
        let name = ["dev", "test"].iter().find_map(|prefix| address.name().strip_prefix(prefix));
        match name {
            Some(name) if address.kind() == polymq_core::ChannelKind::Queue => Address::queue(&name[1..]),
            _ => address.clone(),
        }
    }
}

#[derive(Debug)]
struct ListsNothing;

#[async_trait]
impl Twist for ListsNothing {
    async fn list(&self, _: &dyn Connection) -> Result<Vec<Listed>> {
        Ok(Vec::new())
    }
}

#[derive(Debug)]
struct RefusesOrdinaryNames;

impl Twist for RefusesOrdinaryNames {
    fn check_address(&self, connection: &dyn Connection, address: &Address) -> Result<()> {
        if address.name().contains('_') {
            return Err(polymq_core::Error::new(ErrorKind::InvalidInput, "an underscore"));
        }
        connection.check_address(address)
    }
}

#[derive(Debug)]
struct TakesWhatItPeeks;

#[async_trait]
impl Twist for TakesWhatItPeeks {
    async fn peek(
        &self,
        connection: &dyn Connection,
        address: &Address,
        group: Option<&str>,
        max: usize,
    ) -> Result<Vec<Message>> {
        let seen = connection.peek(address, group, max).await?;
        connection.purge(address).await?;
        Ok(seen)
    }
}

/// Waits for ever where the broker does not answer.
#[derive(Debug)]
struct AsksWithoutEnd;

#[async_trait]
impl Twist for AsksWithoutEnd {
    async fn delete(&self, connection: &dyn Connection, address: &Address, group: Option<&str>) -> Result<()> {
        match connection.delete(address, group).await {
            Err(error) if matches!(error.kind(), ErrorKind::Timeout | ErrorKind::Disconnected) => {
                std::future::pending().await
            }
            answer => answer,
        }
    }
}
