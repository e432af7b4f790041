//! A TCP proxy that breaks the network on command.
//!
//! It stands before a broker; clients connect to [`Proxy::address`]. What it does is what it was told last, for
//! all connections, at once and for as long as it is told: nothing is left to chance.

use std::{
    collections::VecDeque,
    fmt, io,
    net::{Ipv4Addr, SocketAddr},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep, sleep_until, timeout},
};

/// A way through the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From clients to the broker.
    Up,
    /// From the broker to clients.
    Down,
}

/// What is to happen; read by every connection.
#[derive(Debug, Clone, Default)]
struct Plan {
    paused_up: bool,
    paused_down: bool,
    refuse: bool,
    latency: Duration,
    /// Every so manieth piece is later still by so much.
    stalls: Option<(u64, Duration)>,
    /// Bytes a second.
    bandwidth: Option<u64>,
    /// Connections of an earlier generation are reset.
    generation: u64,
}

#[derive(Debug)]
struct Shared {
    plan: watch::Sender<Plan>,
    /// Bytes that may still pass before everything is reset; negative: no such limit.
    left_up: AtomicI64,
    left_down: AtomicI64,
    accepted: AtomicUsize,
    open: AtomicUsize,
    resets: AtomicUsize,
    up: AtomicU64,
    down: AtomicU64,
}

/// Counts since the proxy started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ProxyStats {
    /// Connections that clients have made.
    pub accepted: usize,
    /// Connections that are open.
    pub open: usize,
    /// Connections that were reset or refused.
    pub resets: usize,
    /// Bytes that have passed to the broker.
    pub up: u64,
    /// Bytes that have passed to clients.
    pub down: u64,
}

/// A TCP proxy before one server. Dropping it resets every connection.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// Starts a proxy on a free port.
    ///
    /// # Errors
    /// When no port can be had.
    pub async fn start(target: SocketAddr) -> io::Result<Self> {
        Self::start_on(0, target).await
    }

    /// The same on this port, such as one of [`free_port`](crate::free_port): nobody else gets that one when the proxy is gone.
    ///
    /// # Errors
    /// When the port cannot be had.
    pub async fn start_on(port: u16, target: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            plan: watch::Sender::default(),
            left_up: AtomicI64::new(-1),
            left_down: AtomicI64::new(-1),
            accepted: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
            resets: AtomicUsize::new(0),
            up: AtomicU64::new(0),
            down: AtomicU64::new(0),
        });
        let task = tokio::spawn(accept(listener, target, Arc::clone(&shared)));
        Ok(Self { address, shared, task })
    }

    /// Where clients connect.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Nothing passes in either direction, and nobody is told: a black hole. New connections are accepted into it.
    pub fn pause(&self) {
        self.change(|plan| (plan.paused_up, plan.paused_down) = (true, true));
    }

    /// Nothing passes in this direction.
    pub fn pause_one_way(&self, direction: Direction) {
        self.change(|plan| match direction {
            Direction::Up => plan.paused_up = true,
            Direction::Down => plan.paused_down = true,
        });
    }

    /// Everything passes again, and first what was held back.
    pub fn resume(&self) {
        self.change(|plan| (plan.paused_up, plan.paused_down) = (false, false));
    }

    /// Resets every connection (RST, without a goodbye). What was held back is lost.
    pub fn reset_all(&self) {
        self.shared.reset_all();
    }

    /// Whether new connections are reset at once.
    pub fn refuse(&self, refuse: bool) {
        self.change(|plan| plan.refuse = refuse);
    }

    /// Every piece is late by this much; they follow each other as closely as before.
    pub fn latency(&self, latency: Duration) {
        self.change(|plan| plan.latency = latency);
    }

    /// Loses packets as far as TCP lets anybody see it: every `every`th piece comes later by `stall`, the time until it is
    /// sent again, and whatever follows on its connection waits behind it.
    pub fn stalls(&self, every: u64, stall: Duration) {
        self.change(|plan| plan.stalls = (every > 0).then_some((every, stall)));
    }

    /// The most bytes a second, in each direction of each connection.
    pub fn bandwidth(&self, bytes_per_second: Option<u64>) {
        self.change(|plan| plan.bandwidth = bytes_per_second.map(|rate| rate.max(1)));
    }

    /// Resets every connection when this many more bytes have passed in this direction, in the middle of a frame
    /// if that is where it is.
    pub fn cut_after(&self, direction: Direction, bytes: u32) {
        self.shared.left(direction).store(bytes.into(), Ordering::SeqCst);
    }

    /// Lets what clients send pass, and resets every connection instead of passing the next answer on: the broker
    /// has done it and the client does not know.
    pub fn cut_before_reply(&self) {
        self.cut_after(Direction::Down, 0);
    }

    /// Whether a cut that was asked for has not come yet.
    #[must_use]
    pub fn will_cut(&self) -> bool {
        [Direction::Up, Direction::Down].iter().any(|way| self.shared.left(*way).load(Ordering::SeqCst) >= 0)
    }

    /// What has passed.
    #[must_use]
    pub fn stats(&self) -> ProxyStats {
        let shared = &self.shared;
        ProxyStats {
            accepted: shared.accepted.load(Ordering::Relaxed),
            open: shared.open.load(Ordering::Relaxed),
            resets: shared.resets.load(Ordering::Relaxed),
            up: shared.up.load(Ordering::Relaxed),
            down: shared.down.load(Ordering::Relaxed),
        }
    }

    fn change(&self, change: impl FnOnce(&mut Plan)) {
        self.shared.plan.send_modify(change);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
        self.shared.reset_all();
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxy").field("address", &self.address).field("stats", &self.stats()).finish_non_exhaustive()
    }
}

impl Shared {
    fn left(&self, direction: Direction) -> &AtomicI64 {
        match direction {
            Direction::Up => &self.left_up,
            Direction::Down => &self.left_down,
        }
    }

    fn reset_all(&self) {
        self.plan.send_modify(|plan| plan.generation += 1);
    }
}

async fn accept(listener: TcpListener, target: SocketAddr, shared: Arc<Shared>) {
    loop {
        let Ok((client, _)) = listener.accept().await else { continue };
        shared.accepted.fetch_add(1, Ordering::Relaxed);
        // Subscribed here, so that a reset right after this is seen.
        let plan = shared.plan.subscribe();
        tokio::spawn(serve(client, target, plan, Arc::clone(&shared)));
    }
}

async fn serve(client: TcpStream, target: SocketAddr, mut plan: watch::Receiver<Plan>, shared: Arc<Shared>) {
    let generation = plan.borrow_and_update().generation;
    let refused = plan.borrow().refuse;
    let server = if refused { None } else { TcpStream::connect(target).await.ok() };
    let Some(server) = server else {
        reset(&client);
        shared.resets.fetch_add(1, Ordering::Relaxed);
        return;
    };
    shared.open.fetch_add(1, Ordering::Relaxed);
    // Small frames must not wait for each other.
    let _ = client.set_nodelay(true);
    let _ = server.set_nodelay(true);
    let (mut client, mut server) = (client, server);
    let was_reset = {
        let ((from_client, to_client), (from_server, to_server)) = (client.split(), server.split());
        let up = Pipe { direction: Direction::Up, plan: plan.clone(), shared: Arc::clone(&shared) };
        let down = Pipe { direction: Direction::Down, plan: plan.clone(), shared: Arc::clone(&shared) };
        let both = async {
            let (mut up, mut down) = (pin!(up.run(from_client, to_server)), pin!(down.run(from_server, to_client)));
            tokio::select! {
                // A client that has gone looks like one that only has nothing more to say, and some servers keep the
                // connection of either for minutes.
                () = &mut up => drop(timeout(LINGER, down).await),
                () = &mut down => up.await,
            }
        };
        tokio::select! {
            biased;
            _ = plan.wait_for(|plan| plan.generation != generation) => true,
            _ = both => false,
        }
    };
    if was_reset {
        reset(&client);
        reset(&server);
        shared.resets.fetch_add(1, Ordering::Relaxed);
    }
    shared.open.fetch_sub(1, Ordering::Relaxed);
}

/// How long an answer may still take after the client has said its last word.
const LINGER: Duration = Duration::from_secs(5);

/// RST instead of FIN when the socket is dropped.
fn reset(stream: &TcpStream) {
    // Fails only on a socket that is gone already.
    let _ = stream.set_zero_linger();
}

/// One direction of one connection.
struct Pipe {
    direction: Direction,
    plan: watch::Receiver<Plan>,
    shared: Arc<Shared>,
}

impl Pipe {
    async fn run(mut self, mut from: ReadHalf<'_>, mut to: WriteHalf<'_>) {
        /// Pieces under way; more wait at the sender.
        const MOST: usize = 64;
        let mut buffer = vec![0; 16 * 1024];
        let mut under_way: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
        let (mut ended, mut pieces, mut last_due) = (false, 0, Instant::now());
        while !ended || !under_way.is_empty() {
            let due = under_way.front().map(|(due, _)| *due);
            tokio::select! {
                biased;
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    let piece = under_way.pop_front().map(|(_, piece)| piece).unwrap_or_default();
                    if !self.pass_slowly(&piece, &mut to).await {
                        return;
                    }
                }
                read = from.read(&mut buffer), if !ended && under_way.len() < MOST => match read {
                    Ok(0) | Err(_) => ended = true,
                    Ok(read) => {
                        pieces += 1;
                        last_due = last_due.max(Instant::now() + self.lateness(pieces));
                        under_way.push_back((last_due, buffer[..read].to_vec()));
                    }
                },
            }
        }
        // An orderly end stays orderly.
        let _ = to.shutdown().await;
    }

    /// How late this piece is.
    fn lateness(&self, number: u64) -> Duration {
        let plan = self.plan.borrow();
        let stall =
            plan.stalls.filter(|(every, _)| number.is_multiple_of(*every)).map_or(Duration::ZERO, |(_, stall)| stall);
        plan.latency + stall
    }

    /// Writes a piece as fast as it may pass; `false` when it was the last.
    async fn pass_slowly(&mut self, piece: &[u8], to: &mut WriteHalf<'_>) -> bool {
        self.wait_until_open().await;
        let bandwidth = self.plan.borrow().bandwidth;
        let most = bandwidth.map_or(piece.len(), |rate| usize::try_from(rate / 20).unwrap_or(usize::MAX));
        for part in piece.chunks(most.clamp(1, piece.len().max(1))) {
            if let Some(rate) = bandwidth {
                sleep(Duration::from_secs_f64(part.len() as f64 / rate as f64)).await;
                self.wait_until_open().await;
            }
            if !self.pass(part, to).await {
                return false;
            }
        }
        true
    }

    async fn wait_until_open(&mut self) {
        let direction = self.direction;
        let open = move |plan: &Plan| match direction {
            Direction::Up => !plan.paused_up,
            Direction::Down => !plan.paused_down,
        };
        // The sender lives as long as the proxy; after it, the connection is reset anyway.
        let _ = self.plan.wait_for(open).await;
    }

    /// Writes what may pass; `false` when it was the last.
    async fn pass(&self, piece: &[u8], to: &mut WriteHalf<'_>) -> bool {
        let left = self.shared.left(self.direction);
        let allowed = left.load(Ordering::SeqCst);
        let length = match usize::try_from(allowed) {
            Ok(allowed) => allowed.min(piece.len()),
            Err(_) => piece.len(),
        };
        if to.write_all(&piece[..length]).await.is_err() {
            return false;
        }
        let counter = match self.direction {
            Direction::Up => &self.shared.up,
            Direction::Down => &self.shared.down,
        };
        counter.fetch_add(length as u64, Ordering::Relaxed);
        if allowed < 0 {
            return true;
        }
        if length < piece.len() || allowed == 0 {
            left.store(-1, Ordering::SeqCst);
            self.shared.reset_all();
            return false;
        }
        left.fetch_sub(length as i64, Ordering::SeqCst);
        true
    }
}
