//! Certificates for tests of TLS: an authority of the test's own, and what it has signed.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose};

/// Certificates and keys as PEM files in a directory that is gone when this is dropped.
///
/// | file | what |
/// |---|---|
/// | `ca.pem` | the authority |
/// | `server.pem`, `server.key` | a server called `localhost`; to `127.0.0.1` it is somebody else's |
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
        certificates.signed("server", &["localhost"], &ours);
        certificates.signed("client", &["client.example"], &ours);
        certificates.signed("stranger", &["client.example"], &other);
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

    fn signed(&self, file: &str, names: &[&str], by: &CertifiedIssuer<'static, KeyPair>) {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).expect("names");
        params.distinguished_name.push(DnType::CommonName, file);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, by).expect("a certificate");
        self.write(&format!("{file}.pem"), &certificate.pem());
        self.write(&format!("{file}.key"), &key.serialize_pem());
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.0.join(name), text).expect("the directory can be written to");
    }
}

impl Drop for Certificates {
    fn drop(&mut self) {
        // Files of a test that has its result.
        let _ = fs::remove_dir_all(&self.0);
    }
}
