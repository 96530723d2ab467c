//! Names and attributes of an image that is being made: what becomes its directories and inodes.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry as Slot;

/// Index of a [`Node`] in its [`Tree`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct NodeId(u32);

impl NodeId {
    pub(super) fn index(self) -> usize {
        self.0 as usize
    }
}

/// Where a regular file's data is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileData {
    Empty,
    /// In the image, from this block on.
    Blocks {
        first: u32,
        size: u64,
    },
    /// In the spool, to go behind the inode.
    Spooled {
        offset: u64,
        size: u32,
    },
}

/// What a node is.
#[derive(Debug)]
pub(crate) enum NodeKind {
    Directory {
        children: BTreeMap<Box<[u8]>, NodeId>,
        parent: NodeId,
    },
    File(FileData),
    Symlink(Box<[u8]>),
    /// Major and minor number; 0:0 is overlayfs's whiteout.
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
    Fifo,
}

/// Owner, permissions and time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attributes {
    /// The 12 permission bits.
    pub permissions: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: i64,
    pub mtime_nsec: u32,
}

impl Attributes {
    /// Of directories that the layer implies and does not have: root's, 0755, without a time.
    pub(crate) const IMPLIED: Self = Self {
        permissions: 0o755,
        uid: 0,
        gid: 0,
        mtime: 0,
        mtime_nsec: 0,
    };
}

/// A file of any kind.
#[derive(Debug)]
pub(crate) struct Node {
    pub kind: NodeKind,
    pub attributes: Attributes,
    /// Full names and values.
    pub xattrs: BTreeMap<Box<[u8]>, Box<[u8]>>,
    /// Names that lead to it; of a directory, not counted here.
    pub links: u32,
}

/// A tree of nodes, with its root.
#[derive(Debug)]
pub(crate) struct Tree {
    nodes: Vec<Node>,
}

impl Tree {
    /// The root directory.
    pub(crate) const ROOT: NodeId = NodeId(0);

    /// A tree that has only its root.
    pub(crate) fn new() -> Self {
        let kind = NodeKind::Directory {
            children: BTreeMap::new(),
            parent: Self::ROOT,
        };
        Self {
            nodes: vec![Node {
                kind,
                attributes: Attributes::IMPLIED,
                xattrs: BTreeMap::new(),
                links: 1,
            }],
        }
    }

    /// How many nodes were made, those included that later entries replaced.
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    pub(crate) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }

    pub(crate) fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id.index()]
    }

    /// What `name` is in the directory `parent`; `None` also if `parent` is no directory.
    pub(crate) fn child(&self, parent: NodeId, name: &[u8]) -> Option<NodeId> {
        match &self.node(parent).kind {
            NodeKind::Directory { children, .. } => children.get(name).copied(),
            _ => None,
        }
    }

    /// The directory that holds `directory`; the root's is the root itself, as is that of what is no directory.
    pub(crate) fn parent(&self, directory: NodeId) -> NodeId {
        match self.node(directory).kind {
            NodeKind::Directory { parent, .. } => parent,
            _ => Self::ROOT,
        }
    }

    /// Makes a node without a name.
    pub(crate) fn add(&mut self, kind: NodeKind, attributes: Attributes) -> NodeId {
        // A layer's number of entries is bounded far below this.
        let id = NodeId(u32::try_from(self.nodes.len()).unwrap_or(u32::MAX));
        self.nodes.push(Node {
            kind,
            attributes,
            xattrs: BTreeMap::new(),
            links: 0,
        });
        id
    }

    /// Makes an empty directory for [`Tree::link`] into `parent`.
    pub(crate) fn add_directory(&mut self, parent: NodeId, attributes: Attributes) -> NodeId {
        self.add(
            NodeKind::Directory {
                children: BTreeMap::new(),
                parent,
            },
            attributes,
        )
    }

    /// Names `node` as `name` in `parent`. What had that name loses it.
    pub(crate) fn link(&mut self, parent: NodeId, name: &[u8], node: NodeId) {
        let mut replaced = None;
        if let NodeKind::Directory { children, .. } = &mut self.node_mut(parent).kind {
            match children.entry(name.into()) {
                Slot::Occupied(mut slot) => replaced = Some(slot.insert(node)),
                Slot::Vacant(slot) => {
                    slot.insert(node);
                }
            }
            self.node_mut(node).links += 1;
        }
        if let Some(old) = replaced {
            self.drop_link(old);
        }
    }

    /// Takes a link from a node and, if it is a directory, from everything below it.
    fn drop_link(&mut self, node: NodeId) {
        let mut pending = vec![node];
        while let Some(id) = pending.pop() {
            let node = self.node_mut(id);
            node.links = node.links.saturating_sub(1);
            if let NodeKind::Directory { children, .. } = &mut node.kind {
                pending.extend(std::mem::take(children).into_values());
            }
        }
    }
}
