//! Registries whose images must be signed.

use super::*;
use crate::image::policy::Policy;
use crate::image::policy::tests::Signer;

/// A registry with an image in `org/app`, and what signatures there are of it.
fn registry(made: &TestImage, signatures: Signatures) -> Server {
    let copy = made.clone();
    Server::start(move |path, _, stream| {
        let tag = format!("/manifests/sha256-{}.sig", Digest::of(&copy.manifest).hex());
        let signatures = signatures.lock().unwrap().clone();
        if path.ends_with(&tag) {
            return match manifest_of(&signatures) {
                Some(manifest) => answer(stream, "200 OK", "", &manifest),
                None => answer(stream, "404 Not Found", "", b""),
            };
        }
        let statement = signatures
            .iter()
            .find(|(statement, _)| path.ends_with(&format!("/blobs/{}", Digest::of(statement))));
        match statement {
            Some((statement, _)) => answer(stream, "200 OK", "", statement),
            None => serve(&copy, path, stream),
        }
    })
}

/// Statements, and the signatures over them.
type Signatures = Arc<Mutex<Vec<(Vec<u8>, String)>>>;

fn manifest_of(signatures: &[(Vec<u8>, String)]) -> Option<Vec<u8>> {
    let layers: Vec<_> = signatures
        .iter()
        .map(|(statement, signature)| {
            serde_json::json!({
                "mediaType": "application/vnd.dev.cosign.simplesigning.v1+json",
                "digest": Digest::of(statement), "size": statement.len(),
                "annotations": {"dev.cosignproject.cosign/signature": signature},
            })
        })
        .collect();
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": TestImage::MANIFEST,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": Digest::of(b"{}"), "size": 2},
        "layers": layers,
    });
    (!layers.is_empty()).then(|| manifest.to_string().into_bytes())
}

fn policies(policies: Vec<Policy>) -> ImageConfig {
    ImageConfig {
        policies,
        ..quick()
    }
}

#[tokio::test]
async fn only_what_is_signed_comes_in() {
    let made = image();
    let digest = Digest::of(&made.manifest);
    let signatures = Signatures::default();
    let server = registry(&made, signatures.clone());
    let signer = Signer::new();
    let node = node(policies(vec![signer.policy(&server.address)]));
    let name = format!("{}/org/app", server.address);
    let wrong_digest = signer.sign(&name, &Digest::of(b"other"));
    let wrong_name = signer.sign("elsewhere.example/org/app", &digest);
    let wrong_key = Signer::new().sign(&name, &digest);
    let (statement, _) = signer.sign(&name, &digest);
    let forged = (statement, wrong_key.1.clone());
    for (found, part) in [
        (vec![], "no signature"),
        (vec![wrong_digest.clone()], "is for sha256:"),
        (vec![wrong_name], "elsewhere.example"),
        (vec![wrong_key], "configured key"),
        (vec![forged], "configured key"),
    ] {
        *signatures.lock().unwrap() = found;
        let error = node.pull(&server).await.unwrap_err();
        assert!(matches!(error, ImageError::Untrusted { .. }), "{error}");
        assert!(error.to_string().contains(part), "{part}: {error}");
        assert!(error.to_string().starts_with("SignatureValidationFailed: "));
        assert!(node.is_empty().await);
    }
    assert_eq!(server.seen(&Digest::of(&made.layers[0]).to_string()), 0);
    // One that is right among others is enough.
    *signatures.lock().unwrap() = vec![wrong_digest, signer.sign(&name, &digest)];
    assert_eq!(node.pull(&server).await.unwrap().id, made.id());
    assert!(node.images.get(&name).await.unwrap().is_some());
    assert!(node.images.get(&made.id()).await.unwrap().is_some());
}

#[tokio::test]
async fn what_is_here_is_not_trusted_under_a_name_that_demands_a_signature() {
    let made = image();
    let digest = Digest::of(&made.manifest);
    let signatures = Signatures::default();
    let server = registry(&made, signatures.clone());
    let (signer, later) = (Signer::new(), Signer::new());
    let name = format!("{}/org/app", server.address);
    let by_digest = format!("{name}@{digest}");
    // Pulled while nothing was demanded.
    let mut node = node(quick());
    node.pull(&server).await.unwrap();
    let reopen = |node: Node, config: ImageConfig| {
        drop(node.images);
        let images = Images::open(node.root.path(), config).unwrap();
        Node {
            root: node.root,
            images,
        }
    };
    let here = async |node: &Node| {
        let mut here = Vec::new();
        for name in [&name, &by_digest, &made.id()] {
            here.push(node.images.get(name).await.unwrap().is_some());
        }
        here
    };
    assert_eq!(here(&node).await, [true, true, true]);
    node = reopen(node, policies(vec![signer.policy(&name)]));
    assert_eq!(here(&node).await, [false, false, false]);
    assert!(matches!(
        node.pull(&server).await,
        Err(ImageError::Untrusted { .. })
    ));
    assert_eq!(here(&node).await, [false, false, false]);
    assert!(
        node.images.find(&name).await.unwrap().is_some(),
        "it can be seen and removed"
    );
    // A file cannot bring it in under that name, but under another.
    let layout = node.root.path().join("layout");
    made.layout(&layout, &name);
    for wanted in [Some(&*name), None] {
        let error = node.images.load(&layout, wanted, |_| {}).await.unwrap_err();
        assert!(matches!(error, ImageError::Untrusted { .. }), "{error}");
    }
    node.images
        .load(&layout, Some("free.example/app"), |_| {})
        .await
        .unwrap();
    assert_eq!(here(&node).await, [false, false, true]);
    assert!(node.images.get("free.example/app").await.unwrap().is_some());
    // The signature comes, and no layer moves again.
    signatures.lock().unwrap().push(signer.sign(&name, &digest));
    let moved = server.seen("/blobs/");
    node.pull(&server).await.unwrap();
    assert_eq!(
        server.seen("/blobs/") - moved,
        2,
        "the statement and the configuration"
    );
    assert_eq!(here(&node).await, [true, true, true]);
    // What one key verified another has not.
    node = reopen(node, policies(vec![later.policy(&name)]));
    assert_eq!(here(&node).await, [false, false, true]);
}
