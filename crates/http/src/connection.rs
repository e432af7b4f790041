//! A connection: a client for its producers, and a server that its first consumer starts.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use async_trait::async_trait;
use polymq_core::{
    Address, Capabilities, Connection, ConsumeOptions, Consumer, Error, ErrorKind, HealthWatch, ProduceOptions,
    Producer, Result, Settings, config::redact_url,
};
use tokio::{
    sync::{Mutex, OnceCell},
    time::timeout,
};

use crate::{
    NAME, backend,
    client::Link,
    config::{self, HttpConfig},
    connect::Client,
    consumer::HttpConsumer,
    listener::Listener,
    place::Place,
    producer::{HttpProducer, unknown_option},
    settle::Share,
    target::{Listen, check_name},
};

/// Sends to a URL and listens at an address; neither is touched before it is used.
#[derive(Debug)]
pub struct HttpConnection {
    link: Arc<Link>,
    capabilities: Capabilities,
    listener: Mutex<Option<Arc<Listener>>>,
    /// Whether everything was answered when it was closed.
    closed: OnceCell<bool>,
    /// Whether the first one who closed has heard so.
    told: AtomicBool,
}

impl HttpConnection {
    /// Reads the settings. HTTP has no connection to keep: nobody is asked yet whether anybody is there. What it does is
    /// done in the Tokio runtime that this is called in.
    ///
    /// # Errors
    /// [`ErrorKind::Config`], also outside of a runtime.
    pub fn connect(settings: &Settings) -> Result<Self> {
        let config = HttpConfig::parse(settings)?;
        let capabilities = backend::capabilities(&config);
        Ok(Self {
            link: Arc::new(Link::new(config)?),
            capabilities,
            listener: Mutex::default(),
            closed: OnceCell::new(),
            told: AtomicBool::new(false),
        })
    }

    /// Where consumers listen; `None` before there is one.
    pub async fn local_address(&self) -> Option<SocketAddr> {
        self.listener.lock().await.as_ref().map(|listener| listener.address())
    }

    /// The client behind the producers. Its kept connections stay open for as long as a copy of it is there.
    ///
    /// # Errors
    /// [`ErrorKind::Closed`] once the connection is closed.
    pub fn native(&self) -> Result<Client> {
        self.link.with_client(Client::clone)
    }

    async fn listener(&self) -> Result<Arc<Listener>> {
        let mut listener = self.listener.lock().await;
        self.link.check_open("consume")?;
        if let Some(listener) = &*listener {
            return Ok(Arc::clone(listener));
        }
        let link = Arc::clone(&self.link);
        let binding = self.link.runtime.spawn(async move { Listener::bind(&link.config).await });
        // It is lost when its runtime has ended.
        let bound = binding.await.map_err(|_| Error::closed("consume").with_backend(NAME))??;
        Ok(Arc::clone(listener.insert(Arc::new(bound))))
    }

    /// Sends those away who wait here, and waits for the answers that are awaited here; whether all of them came.
    async fn wind_up(&self) -> bool {
        self.link.close();
        // It stays: who closes after a close that was cancelled waits for its end too.
        let listener = self.listener.lock().await.clone();
        let ending = async {
            if let Some(listener) = listener {
                listener.close().await;
            }
        };
        // At a time: what this process has sent to itself is answered by the end of its consumers.
        let ((), flushed) = tokio::join!(ending, timeout(self.link.config.drain_timeout, self.link.flush()));
        self.link.hang_up();
        self.link.health.closed("closed by this program");
        flushed.is_ok()
    }
}

#[async_trait]
impl Connection for HttpConnection {
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
        check_name(address)
    }

    async fn producer(&self, address: &Address, options: &ProduceOptions) -> Result<Box<dyn Producer>> {
        self.link.check_open("produce")?;
        Ok(Box::new(HttpProducer::new(Arc::clone(&self.link), address, options)?))
    }

    async fn consumer(&self, address: &Address, options: &ConsumeOptions) -> Result<Box<dyn Consumer>> {
        let settings = &self.link.config;
        let (mut method, mut path) = (settings.method.as_str(), settings.listen()?.path_of(address.name()));
        for (key, value) in &options.extra {
            match key.as_str() {
                "method" => method = value,
                "endpoint" if value.starts_with('/') => path = Listen::parse(&format!("any:0{value}"))?.path_of(""),
                "endpoint" => {
                    return Err(Error::new(
                        ErrorKind::InvalidInput,
                        format!("the endpoint {:?} is no path", redact_url(value)),
                    )
                    .with_backend(NAME)
                    .with_hint("a consumer's endpoint begins with a slash; where it listens is the setting listen"));
                }
                _ => return Err(unknown_option(key, "method, endpoint")),
            }
        }
        let path = path.trim_end_matches('/').to_owned();
        let method = config::method(method)?;
        let listener = self.listener().await?;
        let (share, received) = Share::new(options);
        let share = Arc::new(share);
        listener.server.add(path, address, method, Arc::clone(&share))?;
        Ok(Box::new(HttpConsumer::new(share, received, listener)))
    }

    /// A path exists while it is consumed; there is nothing to make before.
    async fn declare(&self, _: &Address, _: &ConsumeOptions) -> Result<()> {
        self.link.check_open("declare")
    }

    /// Nothing is kept, so there is nothing to delete.
    async fn delete(&self, _: &Address, _: Option<&str>) -> Result<()> {
        self.link.check_open("delete")
    }

    /// Asks the server for its options: any answer will do.
    async fn ping(&self) -> Result<()> {
        self.link.check_open("ping")?;
        let place = Arc::new(Place::new(&self.link, self.link.config.target()?.url())?);
        let asked = place.request(&self.link, http::Method::OPTIONS, self.link.config.connect_timeout)?;
        // A connection of this pool lives where all others do, not where somebody asks.
        let link = Arc::clone(&self.link);
        let asking = self.link.runtime.spawn(async move { link.exchange(asked).await });
        match asking.await.map_err(|_| Error::closed("ping").with_backend(NAME))? {
            Ok(_) => Ok(()),
            Err(error) => match error.kind() {
                // Nobody was harmed by a question without an answer.
                ErrorKind::UnknownOutcome => Err(error.with_kind(ErrorKind::Timeout).with_operation("connect")),
                ErrorKind::Disconnected | ErrorKind::Timeout | ErrorKind::Unauthenticated => Err(error),
                _ => Ok(()),
            },
        }
    }

    async fn close(&self) -> Result<()> {
        // Who closes at the same time waits for the same end.
        let answered = *self.closed.get_or_init(|| self.wind_up()).await;
        if answered || self.told.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Timeout, "not everything that was sent was answered in time")
            .with_backend(NAME)
            .with_operation("close")
            .with_hint("raise drain_timeout, or flush before"))
    }
}
