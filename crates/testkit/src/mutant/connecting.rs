//! Mutants that connect, check, close and tell about themselves wrongly.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use polymq_core::{
    Address, Backend, Capabilities, Completion, Connection, ConsumeOptions, Consumer, Error, ErrorKind, HealthReporter,
    HealthState, HealthWatch, Message, ProduceOptions, Producer, Receipt, Registry, Result, Settings, Start, Stats,
    Wildcards,
};
use tokio::task::Id;

use super::{Mutant, mutant};
use crate::{
    cx::lock,
    twist::{Receiving, Sending, Twist},
};

pub(super) const MUTANTS: &[Mutant] = &[
    mutant("declares_another_limit_later", || Arc::new(DeclaresAnotherLimit), &["B1_oversize"]),
    mutant("creates_silently", || Arc::new(Declares(true)), &["B5_missing_queue_consume", "B5_missing_queue_send"]),
    mutant("says_no_late", || Arc::new(SaysNoLate), &["B5_missing_queue_consume", "B5_missing_queue_send"]),
    mutant("never_creates", || Arc::new(Declares(false)), &["B5_created_by_policy"]),
    mutant(
        "knows_no_kinds_of_errors",
        || Arc::new(NoKinds),
        &["B5_wrong_password", "B5_permission_denied", "F12_password_changes", "F14_throttled"],
    ),
    mutant("checks_with_a_runtime", || Arc::new(ChecksWithRuntime), &["B6_constructors_do_no_io"]),
    mutant("connects_without_end", || Arc::new(ConnectsWithoutEnd), &["B6_connect_is_bounded"]),
    mutant("dies_with_its_task", || Arc::new(DiesWithItsTask::default()), &["B6_handles_outlive_their_task"]),
    mutant("hangs_on_close", || Arc::new(HangsOnClose), &["L2_second_signal_forces"]),
    mutant("never_closes", || Arc::new(NeverCloses), &["L4_after_close", "L5_close_with_a_blocked_consumer"]),
    mutant("gives_each_member_everything", || Arc::new(NoGroups), &["T2_group_shares"]),
    mutant("forgets_groups", || Arc::new(ForgetsGroups::default()), &["T3_group_misses_nothing"]),
    mutant("claims_replay", || Arc::new(ClaimsReplay), &["T4_start"]),
    mutant("claims_wildcards", || Arc::new(ClaimsWildcards), &["T5_wildcards"]),
    mutant("counts_nothing", || Arc::new(CountsNothing), &["D2_stats", "D3_purge"]),
    mutant("leaks_a_task", || Arc::new(LeaksATask), &["L6_open_and_close"]),
    mutant(
        "is_always_up",
        || Arc::new(AlwaysUp(HealthReporter::new())),
        &["F4_black_hole", "F7_half_open", "X1_health_without_a_fault", "X1_health_while_the_broker_is_away"],
    ),
    mutant("tries_to_start_once", || Arc::new(StartsOnce), &["F8_starts_before_the_broker"]),
    mutant("never_gives_up", || Arc::new(NeverGivesUp), &["F8_gives_up_at_the_limit"]),
    mutant("connects_for_each_producer", || Arc::new(ConnectsForEach::default()), &["L6_connections_are_shared"]),
    mutant("gives_up", || Arc::new(GivesUp), &["F8_refused_for_a_while"]),
];

#[derive(Debug)]
struct DeclaresAnotherLimit;

impl Twist for DeclaresAnotherLimit {
    fn connection_capabilities(&self, own: Capabilities) -> Capabilities {
        Capabilities { max_payload: own.max_payload.map(|max| max - 1), ..own }
    }
}

#[derive(Debug)]
struct Declares(bool);

#[async_trait]
impl Twist for Declares {
    async fn producer(
        &self,
        connection: &dyn Connection,
        address: &Address,
        options: &ProduceOptions,
    ) -> Result<Box<dyn Producer>> {
        connection.producer(address, &ProduceOptions { declare: self.0, ..options.clone() }).await
    }

    async fn consumer(
        &self,
        connection: &dyn Connection,
        address: &Address,
        options: &ConsumeOptions,
    ) -> Result<Box<dyn Consumer>> {
        connection.consumer(address, &ConsumeOptions { declare: self.0, ..options.clone() }).await
    }
}

/// Every error is an unknown one.
#[derive(Debug)]
struct NoKinds;

fn other(error: Error) -> Error {
    error.with_kind(ErrorKind::Other)
}

#[async_trait]
impl Twist for NoKinds {
    async fn connect(&self, backend: &dyn Backend, settings: &Settings) -> Result<Arc<dyn Connection>> {
        backend.connect(settings).await.map_err(other)
    }

    fn send(&self, at: &Sending, message: Message) -> Completion<Receipt> {
        let sent = at.producer.send(message);
        Completion::future(async move { sent.await.map_err(other) })
    }

    async fn producer(
        &self,
        connection: &dyn Connection,
        address: &Address,
        options: &ProduceOptions,
    ) -> Result<Box<dyn Producer>> {
        connection.producer(address, options).await.map_err(other)
    }
}

/// Takes twenty seconds to say that something is not there.
#[derive(Debug)]
struct SaysNoLate;

async fn late<T>(answer: Result<T>) -> Result<T> {
    if answer.is_err() {
        tokio::time::sleep(Duration::from_secs(60)).await;
    }
    answer
}

#[async_trait]
impl Twist for SaysNoLate {
    async fn producer(
        &self,
        connection: &dyn Connection,
        address: &Address,
        options: &ProduceOptions,
    ) -> Result<Box<dyn Producer>> {
        late(connection.producer(address, options).await).await
    }

    async fn consumer(
        &self,
        connection: &dyn Connection,
        address: &Address,
        options: &ConsumeOptions,
    ) -> Result<Box<dyn Consumer>> {
        late(connection.consumer(address, options).await).await
    }
}

#[derive(Debug)]
struct ChecksWithRuntime;

impl Twist for ChecksWithRuntime {
    fn check(&self, backend: &dyn Backend, settings: &Settings) -> Result<()> {
        drop(tokio::runtime::Handle::current());
        backend.check(settings)
    }
}

#[derive(Debug)]
struct ConnectsWithoutEnd;

#[async_trait]
impl Twist for ConnectsWithoutEnd {
    async fn connect(&self, backend: &dyn Backend, settings: &Settings) -> Result<Arc<dyn Connection>> {
        match backend.connect(settings).await {
            Ok(connection) => Ok(connection),
            Err(_) => std::future::pending().await,
        }
    }
}

/// What it makes works only in the task that made it.
#[derive(Debug, Default)]
struct DiesWithItsTask(Mutex<Option<Id>>);

#[async_trait]
impl Twist for DiesWithItsTask {
    async fn connect(&self, backend: &dyn Backend, settings: &Settings) -> Result<Arc<dyn Connection>> {
        *lock(&self.0) = tokio::task::try_id();
        backend.connect(settings).await
    }

    fn send(&self, at: &Sending, message: Message) -> Completion<Receipt> {
        if tokio::task::try_id() != *lock(&self.0) {
            return Completion::ready(Err(Error::closed("send")));
        }
        at.producer.send(message)
    }
}

#[derive(Debug)]
struct HangsOnClose;

#[async_trait]
impl Twist for HangsOnClose {
    async fn close_consumer(&self, _: &Receiving, _: &mut dyn Consumer) -> Result<()> {
        std::future::pending().await
    }
}

#[derive(Debug)]
struct NeverCloses;

#[async_trait]
impl Twist for NeverCloses {
    async fn close(&self, _: &dyn Connection) -> Result<()> {
        Ok(())
    }
}

#[derive(Debug)]
struct LeaksATask;

#[async_trait]
impl Twist for LeaksATask {
    async fn connect(&self, backend: &dyn Backend, settings: &Settings) -> Result<Arc<dyn Connection>> {
        tokio::spawn(std::future::pending::<()>());
        backend.connect(settings).await
    }
}

/// Lies about the connection.
#[derive(Debug)]
struct AlwaysUp(HealthReporter);

impl Twist for AlwaysUp {
    fn health(&self, _: HealthWatch) -> HealthWatch {
        self.0.up();
        self.0.watch()
    }
}

/// Does not wait for a broker that is not there yet, whatever the settings say.
#[derive(Debug)]
struct StartsOnce;

#[async_trait]
impl Twist for StartsOnce {
    async fn connect(&self, backend: &dyn Backend, settings: &Settings) -> Result<Arc<dyn Connection>> {
        backend.connect(&settings.clone().with("connect_retry", "false")).await
    }
}

/// Whatever limit it is given.
#[derive(Debug)]
struct NeverGivesUp;

#[async_trait]
impl Twist for NeverGivesUp {
    async fn connect(&self, backend: &dyn Backend, settings: &Settings) -> Result<Arc<dyn Connection>> {
        backend.connect(&settings.clone().with("reconnect_limit", "0")).await
    }
}

#[derive(Debug, Default)]
struct ConnectsForEach {
    more: tokio::sync::Mutex<Vec<Arc<dyn Connection>>>,
    settings: Mutex<Settings>,
    backend: Mutex<Option<&'static str>>,
}

#[async_trait]
impl Twist for ConnectsForEach {
    async fn connect(&self, backend: &dyn Backend, settings: &Settings) -> Result<Arc<dyn Connection>> {
        *lock(&self.settings) = settings.clone();
        *lock(&self.backend) = Some(backend.name());
        backend.connect(settings).await
    }

    async fn producer(
        &self,
        connection: &dyn Connection,
        address: &Address,
        options: &ProduceOptions,
    ) -> Result<Box<dyn Producer>> {
        let (name, settings) = (lock(&self.backend).unwrap_or_default(), lock(&self.settings).clone());
        let another = Arc::clone(&*Registry::linked().backend(name)?).connect(&settings).await?;
        self.more.lock().await.push(another);
        connection.producer(address, options).await
    }
}

/// Closes a connection that was lost.
#[derive(Debug)]
struct GivesUp;

#[async_trait]
impl Twist for GivesUp {
    async fn connect(&self, backend: &dyn Backend, settings: &Settings) -> Result<Arc<dyn Connection>> {
        let connection = backend.connect(settings).await?;
        let (lost, mut health) = (Arc::clone(&connection), connection.health());
        tokio::spawn(async move {
            while health.changed().await.is_some_and(|health| health.state != HealthState::Down) {}
            tokio::time::sleep(Duration::from_millis(100)).await;
            drop(lost.close().await);
        });
        Ok(connection)
    }
}

#[derive(Debug)]
struct NoGroups;

#[async_trait]
impl Twist for NoGroups {
    async fn consumer(
        &self,
        connection: &dyn Connection,
        address: &Address,
        options: &ConsumeOptions,
    ) -> Result<Box<dyn Consumer>> {
        connection.consumer(address, &ConsumeOptions { group: None, ..options.clone() }).await
    }
}

/// A group ends with its member.
#[derive(Debug, Default)]
struct ForgetsGroups(Mutex<Option<String>>);

#[async_trait]
impl Twist for ForgetsGroups {
    async fn consumer(
        &self,
        connection: &dyn Connection,
        address: &Address,
        options: &ConsumeOptions,
    ) -> Result<Box<dyn Consumer>> {
        lock(&self.0).clone_from(&options.group);
        connection.consumer(address, options).await
    }

    async fn close_consumer(&self, at: &Receiving, consumer: &mut dyn Consumer) -> Result<()> {
        consumer.close().await?;
        let group = lock(&self.0).clone();
        at.connection.delete(&at.address, group.as_deref()).await
    }
}

#[derive(Debug)]
struct ClaimsReplay;

#[async_trait]
impl Twist for ClaimsReplay {
    fn capabilities(&self, own: Capabilities) -> Capabilities {
        Capabilities { replay: true, ..own }
    }

    async fn consumer(
        &self,
        connection: &dyn Connection,
        address: &Address,
        options: &ConsumeOptions,
    ) -> Result<Box<dyn Consumer>> {
        connection.consumer(address, &ConsumeOptions { start: Start::New, ..options.clone() }).await
    }
}

#[derive(Debug)]
struct ClaimsWildcards;

impl Twist for ClaimsWildcards {
    fn capabilities(&self, own: Capabilities) -> Capabilities {
        Capabilities { wildcards: Some(Wildcards { one: "*", many: "#", separator: "." }), ..own }
    }
}

#[derive(Debug)]
struct CountsNothing;

#[async_trait]
impl Twist for CountsNothing {
    async fn stats(&self, _: &dyn Connection, _: &Address, _: Option<&str>) -> Result<Stats> {
        Ok(Stats::default())
    }

    async fn purge(&self, connection: &dyn Connection, address: &Address) -> Result<u64> {
        connection.purge(address).await.map(|_| 0)
    }
}
