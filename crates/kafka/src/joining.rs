//! Consumers of one channel and group share a hub: the first one makes it, the last one ends it.

use std::sync::Arc;

use polymq_core::{ConsumeOptions, Error, ErrorKind, Result, Start};
use tokio::{sync::oneshot, time::timeout};

use crate::{
    NAME,
    connection::KafkaConnection,
    consumer::KafkaConsumer,
    error,
    hub::Hub,
    link::lock,
    poller::{self, Plan},
    position::Position,
    producer::CLOSE_TIMEOUT,
    settle::KafkaSettler,
    topology::Names,
    transactions::Transactions,
};

impl KafkaConnection {
    /// How a consumer may differ from the rest.
    pub(crate) fn plan(names: &Names, options: &ConsumeOptions) -> Result<Plan> {
        let mut seek = None;
        for (key, value) in &options.extra {
            match key.as_str() {
                "position" => seek = Some(Position::parse(value)?),
                _ => return Err(error::config(format!("unknown option {key:?}; known: position"))),
            }
        }
        if options.transactional && names.group.is_none() {
            return Err(Error::unsupported(NAME, "a transactional consumer without a group").with_hint("name a group"));
        }
        Ok(Plan {
            prefetch: options.prefetch,
            bytes: options.prefetch_bytes,
            start: match options.start {
                _ if names.is_queue => Position::First,
                Start::Earliest => Position::First,
                Start::New => Position::End,
            },
            seek,
            transactional: options.transactional,
        })
    }

    /// The hub of a channel and group, with a share in it.
    pub(crate) async fn join(&self, names: &Names, plan: Plan) -> Result<KafkaConsumer> {
        loop {
            // Others find a new hub from here on: nothing is awaited before its thread has started, which is the one that
            // ends it, whoever drops this future.
            let (hub, is_new) = self.hub(names, plan.transactional)?;
            let Some((share, arrived)) = hub.join(plan.prefetch, plan.bytes) else {
                if is_new {
                    // The connection is being closed, and waits for a thread that there will never be.
                    hub.set_ended();
                }
                // The one before it is just leaving; two members of one process would share for nothing.
                let mut ended = hub.ended();
                let _ = timeout(CLOSE_TIMEOUT, ended.wait_for(|ended| *ended)).await;
                self.forget(names, &hub);
                continue;
            };
            // Opened again by itself it goes on where it was, although it says where to begin.
            let plan = Plan { seek: plan.seek.filter(|_| !hub.resumes(plan.seek)), ..plan };
            if !is_new && plan.seek.is_some() {
                hub.part(share);
                return Err(Error::new(
                    ErrorKind::Conflict,
                    "the group is consumed already, so its position cannot be set",
                )
                .with_backend(NAME)
                .with_hint("set the position with its first consumer"));
            }
            if hub.transactions().is_some() != plan.transactional {
                hub.part(share);
                return Err(Error::new(
                    ErrorKind::Conflict,
                    "the group has consumers in this process that are transactional, and ones that are not",
                )
                .with_backend(NAME)
                .with_hint("make all of them transactional, or none"));
            }
            let settler = KafkaSettler::new(Arc::clone(&hub), Arc::clone(&self.publisher));
            let consumer = KafkaConsumer::new(Arc::clone(&hub), share, arrived, settler);
            if is_new {
                let (ready, begun) = oneshot::channel();
                poller::start(Arc::clone(&hub), Arc::clone(&self.config), Arc::clone(&self.link), plan, ready)?;
                match begun.await.unwrap_or_else(|_| Err(error::panicked("consume"))) {
                    Ok(()) => {}
                    Err(error) => {
                        self.forget(names, &hub);
                        return Err(error);
                    }
                }
            } else {
                // Until then it would miss what is sent, or have an error that nobody hears.
                hub.begun().await?;
            }
            return Ok(consumer);
        }
    }

    fn hub(&self, names: &Names, transactional: bool) -> Result<(Arc<Hub>, bool)> {
        let mut hubs = lock(&self.hubs);
        if hubs.closed {
            return Err(error::closed("consume"));
        }
        let ended: Vec<Names> =
            hubs.groups.iter().filter(|(_, hub)| *hub.ended().borrow()).map(|(names, _)| names.clone()).collect();
        ended.iter().for_each(|names| hubs.remove(names));
        hubs.singles.retain(|hub| !*hub.ended().borrow());
        if names.group.is_none() {
            let hub = Hub::new(names.clone());
            hubs.singles.push(Arc::clone(&hub));
            return Ok((hub, true));
        }
        match hubs.groups.get(names) {
            Some(hub) => Ok((Arc::clone(hub), false)),
            None => {
                let hub = Hub::resuming(names.clone(), hubs.moved.get(names).copied());
                if transactional {
                    hub.set_transactions(Transactions::start(&hub, Arc::clone(&self.config), Arc::clone(&self.link))?);
                }
                hubs.groups.insert(names.clone(), Arc::clone(&hub));
                Ok((hub, true))
            }
        }
    }

    fn forget(&self, names: &Names, hub: &Arc<Hub>) {
        let mut hubs = lock(&self.hubs);
        if hubs.groups.get(names).is_some_and(|known| Arc::ptr_eq(known, hub)) {
            hubs.remove(names);
        }
    }
}
