"""Train MoCo without the leak, measure the leak, show the picture; needs the extra ``train``.

Shape letters besides the package's: ``K`` length of the queue, ``D`` dimension of a feature, ``M``
images of a data set, ``H`` height and width of an image, ``c`` its channels.
"""
