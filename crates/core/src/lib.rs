#![doc = include_str!("../README.md")]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

mod address;
mod admin;
mod backend;
mod bus;
mod capability;
mod channel;
mod clock;
mod completion;
pub mod config;
mod consumer;
pub mod dead_letter;
mod delivery;
mod error;
mod factory;
mod filter;
mod handler;
mod headers;
mod health;
mod kinds;
pub mod layer;
pub mod memory;
mod message;
mod outgoing;
mod pair;
mod policy;
mod prefix;
mod producer;
mod registry;
mod request;
mod runner;
mod service;
mod settling;
mod sieve;
mod subscription;
mod table;
mod tally;
mod topology;
pub mod watch;

pub use polymq_serializers as serializers;

pub use crate::{
    address::{Address, ChannelKind, MAX_NAME_BYTES},
    backend::{Backend, Connection, Key, Listed, Stats},
    bus::{
        BACKEND_VARIABLE, Bus, BusBuilder, Identity, PREFIX_VARIABLE, SENDER_CLIENT, SENDER_COMPONENT, SENDER_VERSION,
        UNLABELLED_VARIABLE, URL_VARIABLE,
    },
    capability::{Capabilities, Delay, DeliveryCount, Order, RedeliveryOrder, Support, Wildcards},
    channel::{Channel, SendStats, WhenFull},
    clock::{due_in, now, set_clock_forward, time_left, until},
    completion::{Completer, Completion},
    config::{Environment, Secret, Settings},
    consumer::{ConsumeOptions, Consumer, Details, Incoming, Settler, Start, Token},
    dead_letter::replay_dead_letters,
    delivery::{Delivery, SettleError},
    error::{BoxError, Error, ErrorKind, Result, Retry},
    factory::{AckMode, ConsumerEntry, ConsumerFactory, Route},
    handler::{
        Attempt, Batch, BatchHandler, BatchOutcome, Blocking, Body, Context, Failure, FromDelivery, Handler,
        IntoBatchOutcome, IntoOutcome, Json, Outcome, Sends, State, View, blocking,
    },
    headers::{Headers, MAX_HEADERS, MAX_TOTAL_BYTES, MAX_VALUE_BYTES, SYSTEM_PREFIX, Text},
    health::{DEGRADED_FOR, Health, HealthReporter, HealthState, HealthWatch},
    kinds::{Kind, KindEntry, Kinds},
    layer::{Layer, NextHandle, NextSend},
    message::{ATTEMPT, MAX_ATTRIBUTE_BYTES, Message, MessageId},
    outgoing::Outgoing,
    pair::{HandlerFactory, HandlerPair},
    policy::{Backoff, DeadLetters, FailurePolicy, Fate, Jitter, RetryMode},
    producer::{ProduceOptions, Producer, Receipt},
    registry::{BackendEntry, ChosenBackend, KnownBackend, Registry},
    request::{Answer, Answered, REPLY_ERROR, Reply},
    runner::{ConsumerRunner, Handled, HandlerError, RouteStats, Running, Stepper},
    service::{BIND_VARIABLE, run_service},
    subscription::Subscription,
    table::{QueueEntry, QueueTable, Scalar},
    tally::{Tally, Ticket},
    topology::{Step, StepKind, StepState, Topology, TopologyPlan},
};

/// For the macros of this project only.
#[doc(hidden)]
pub mod __private {
    pub use inventory;
}
