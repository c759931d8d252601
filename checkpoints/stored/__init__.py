"""A converted folder: stored leaves, the chunks of their files, the manifest, and the journal of an unfinished one."""
