//! Certificates for tests of TLS: an authority of the test's own, and what it has signed.

use std::{
    fs,
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose};

/// Certificates and keys as PEM files in a directory that is gone when this is dropped.
///
/// | file | what |
/// |---|---|
/// | `ca.pem` | the authority |
/// | `server.pem`, `server.key` | a server called `localhost`; to `127.0.0.1` it is somebody else's |
/// | `expired.pem`, `expired.key` | the same, whose time has passed |
/// | `client.pem`, `client.key` | a client |
/// | `other-ca.pem` | another authority, which a server does not trust |
/// | `stranger.pem`, `stranger.key` | a client of that one |
#[derive(Debug)]
pub struct Certificates(PathBuf);

impl Certificates {
    /// Makes all of them.
    ///
    /// # Panics
    /// When the directory for temporary files cannot be written to.
    #[must_use]
    pub fn make() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let directory = std::env::temp_dir().join(format!("polymq-certificates-{}-{number}", std::process::id()));
        fs::create_dir_all(&directory).expect("a directory for certificates");
        let certificates = Self(directory);
        let ours = certificates.authority("ca", "an authority of a test");
        let other = certificates.authority("other-ca", "another authority");
        let valid = |_: &mut CertificateParams| ();
        certificates.signed("server", &["localhost"], &ours, valid);
        certificates.signed("client", &["client.example"], &ours, valid);
        certificates.signed("stranger", &["client.example"], &other, valid);
        certificates.signed("expired", &["localhost"], &ours, |params| {
            params.not_before = rcgen::date_time_ymd(2020, 1, 1);
            params.not_after = rcgen::date_time_ymd(2021, 1, 1);
        });
        certificates
    }

    /// The path of one of the files.
    #[must_use]
    pub fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    /// The directory of the files; more may be put there.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.0
    }

    /// A server that shows one of the certificates to whoever connects, and says no word beyond TLS. `options` are those of
    /// `openssl s_server`; [`TlsServer::TLS_1_1`] makes it speak nothing newer.
    ///
    /// # Panics
    /// When there is no command `openssl`, or it does not listen within a minute.
    #[must_use]
    pub fn serve(&self, certificate: &str, options: &[&str]) -> TlsServer {
        let port = crate::free_port();
        let [pem, key] = ["pem", "key"].map(|kind| self.path(&format!("{certificate}.{kind}")));
        let mut server = Command::new("openssl");
        server.args(["s_server", "-quiet", "-accept", &port.to_string(), "-cert", &pem, "-key", &key]).args(options);
        // Its standard input stays open: it would end with it.
        server.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let server = TlsServer { port, process: server.spawn().expect("the command openssl") };
        let began = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(began.elapsed() < Duration::from_secs(60), "openssl does not listen");
            thread::sleep(Duration::from_millis(20));
        }
        server
    }

    fn authority(&self, file: &str, name: &str) -> CertifiedIssuer<'static, KeyPair> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().expect("a key");
        let issuer = CertifiedIssuer::self_signed(params, key).expect("a certificate");
        self.write(&format!("{file}.pem"), &issuer.pem());
        issuer
    }

    fn signed(
        &self,
        file: &str,
        names: &[&str],
        by: &CertifiedIssuer<'static, KeyPair>,
        change: fn(&mut CertificateParams),
    ) {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).expect("names");
        params.distinguished_name.push(DnType::CommonName, file);
        change(&mut params);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, by).expect("a certificate");
        self.write(&format!("{file}.pem"), &certificate.pem());
        self.write(&format!("{file}.key"), &key.serialize_pem());
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.0.join(name), text).expect("the directory can be written to");
    }
}

/// A server made by [`Certificates::serve`], until this is dropped.
#[derive(Debug)]
pub struct TlsServer {
    port: u16,
    process: Child,
}

impl TlsServer {
    /// A version that nobody may accept any more.
    pub const TLS_1_1: &'static [&'static str] = &["-tls1_1", "-cipher", "ALL:@SECLEVEL=0"];

    /// Where it listens, on 127.0.0.1.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for TlsServer {
    fn drop(&mut self) {
        // It has ended by itself, otherwise.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Drop for Certificates {
    fn drop(&mut self) {
        // Files of a test that has its result.
        let _ = fs::remove_dir_all(&self.0);
    }
}
